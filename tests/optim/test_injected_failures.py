"""A failure at every evaluation and every write of a step, in every mode: no weight is lost.

Weights and mu are such that perturbing in place is exact, so that "as before" means the bits.
"""

import signal
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import each_of, same_bits
from torch import nn
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from zofo_optim import HybridZOFO
from zofo_optim.perturbation import base, in_place, written


@contextmanager
def set_grad_enabled_within_inference():
    """Gradients and inference mode are two switches, and a step meets both of them on."""
    with torch.inference_mode(), torch.set_grad_enabled(True):
        yield


MODES = {
    "enabled": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "both": set_grad_enabled_within_inference,
}
perturbation = each_of(["in_place", "streamed"])
mode = each_of(MODES)
backend = each_of(["auto", "reference"])


class Fault(Exception):
    pass


class Stop(Exception):
    """What a handler of a signal raises."""


def raise_fault():
    raise Fault("injected")


def stop(number, frame):
    raise Stop(number)


FAULTS = {
    "exception": raise_fault,
    "SIGINT": lambda: signal.raise_signal(signal.SIGINT),
    "SIGTERM": lambda: signal.raise_signal(signal.SIGTERM),
    "SIGALRM": lambda: signal.raise_signal(signal.SIGALRM),
}
fault = each_of(FAULTS)
RAISED = (Fault, Stop, KeyboardInterrupt)


class Injector:
    """Counts the places where a step can fail, and fails at one of them."""

    def __init__(self):
        self.place, self.seen, self.fault = None, 0, None

    def reached(self):
        self.seen += 1
        if self.seen == self.place:
            self.fault()

    def arm(self, place, fault):
        self.place, self.seen, self.fault = place, 0, fault

    def around(self, write, *, signals):
        def wrapped(*args, **options):
            self.reached()
            result = write(*args, **options)
            if signals:  # an exception there would be none of the write's
                self.reached()
            return result

        return wrapped


class Restoring(TorchFunctionMode):
    """A place to fail before every copy that puts verified weights back."""

    def __init__(self, injector, weights):
        super().__init__()
        self.injector, self.weights = injector, {id(w) for w in weights}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_ and id(args[0]) in self.weights:
            self.injector.reached()
        return func(*args, **(kwargs or {}))


class Job:
    """Two zeroth-order groups, one of which requires gradients, and a first-order one."""

    def __init__(self, perturbation, backend, injector, **options):
        torch.manual_seed(0)
        layers = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 1)
        self.injector = injector
        self.parameters = [p for layer in layers for p in layer.parameters()]
        with torch.no_grad():
            for p in self.parameters:
                p.copy_((p * 2**6).round() / 2**6 + 0.0)  # no -0, which no move restores
        with torch.inference_mode():
            made = self.parameters[1].clone()  # a weight that was made in inference mode
        self.parameters[1] = Parameter(made, requires_grad=False)
        assert self.parameters[1].is_inference()
        self.parameters[0].requires_grad_(False)
        self.x = torch.linspace(-1, 1, 12).reshape(3, 4)
        injected = injector

        class SGD(torch.optim.SGD):
            def step(self, closure=None):
                injected.reached()
                return super().step(closure)

        zo = dict(mode="zo", lr=1e-2, mu=2.0**-7)
        first, second, third = (self.parameters[i : i + 2] for i in (0, 2, 4))
        self.optimizer = HybridZOFO(
            [dict(zo, params=first), dict(zo, params=second), dict(params=third, lr=1e-2)],
            distribution="rademacher",
            perturbation=perturbation,
            backend=backend,
            fo_optimizer=SGD,
            **options,
        )

    def loss(self):
        self.injector.reached()
        w1, b1, w2, b2, w3, b3 = self.parameters
        hidden = torch.tanh(torch.tanh(self.x @ w1.T + b1) @ w2.T + b2)
        loss = (hidden @ w3.T + b3).square().mean()
        self.injector.reached()
        return loss

    def run(self, call):
        self.optimizer.zero_grad()
        with Restoring(self.injector, self.parameters):
            getattr(self.optimizer, call)(self.loss)

    def values(self):
        return [p.detach().clone() for p in self.parameters]


def same(found, wanted):
    return [same_bits(a, b) for a, b in zip(found, wanted, strict=True)]


@pytest.fixture
def injector(monkeypatch):
    """Places before and after every write of the optimizer, beside those in closures."""
    injector = Injector()
    for module, name in ((in_place, "perturb_"), (base, "update_"), (written, "displace_")):
        write = getattr(module, name)

        def wrapped(*args, write=write, **options):
            signals = injector.fault is not raise_fault
            return injector.around(write, signals=signals)(*args, **options)

        monkeypatch.setattr(module, name, wrapped)
    return injector


@pytest.fixture(autouse=True)
def handlers():
    """Handlers that raise, which must be there again after every fault."""
    wanted = {signal.SIGTERM: stop, signal.SIGALRM: stop}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    wanted[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    yield wanted
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def unchanged(handlers):
    """Whatever happens in the block, torch's modes and the signals' handlers are as before."""

    def state():
        found = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return *found, len(_get_current_function_mode_stack())

    before = state()
    try:
        yield
    finally:
        assert state() == before
        assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_failure_anywhere_loses_no_weight(perturbation, mode, fault, injector, handlers):
    check_every_place(injector, handlers, perturbation, mode, fault)


def test_a_failure_in_backward_loses_no_weight(perturbation, fault, injector, handlers):
    check_every_place(injector, handlers, perturbation, "enabled", fault, call="backward")


def test_a_failure_in_the_reference_backend_loses_no_weight(perturbation, mode, injector, handlers):
    check_every_place(injector, handlers, perturbation, mode, "exception", backend="reference")


@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
def test_a_failure_among_several_directions_loses_no_weight(
    perturbation, estimator, injector, handlers
):
    for fault in ("exception", "SIGTERM"):
        options = dict(estimator=estimator, num_samples=2)
        check_every_place(injector, handlers, perturbation, "enabled", fault, **options)


def check_every_place(
    injector, handlers, perturbation, mode, fault, *, call="step", backend="auto", **options
):
    """A step that fails at any place is undone or done, and the optimizer works on."""
    modes, make = MODES[mode], FAULTS[fault]

    def job():
        injector.arm(None, make)
        return Job(perturbation, backend, injector, **options)

    sound = job()
    before = sound.values()
    with modes():
        sound.run(call)
    places, after = injector.seen, sound.values()
    assert places >= 12
    assert all(same(before, after)) == (call == "backward")

    for place in range(1, places + 1):
        broken = job()
        injector.arm(place, make)
        with unchanged(handlers), modes(), pytest.raises(RAISED), unchanged(handlers):
            broken.run(call)
        injector.arm(None, make)
        found = broken.values()
        undone, done = same(found, before), same(found, after)
        if not all(a or b for a, b in zip(undone, done, strict=True)):
            # only where a write failed that restores: the next call does it
            assert fault == "exception", place
            broken.optimizer.zero_grad()
            broken.optimizer.backward(broken.loss)
            assert all(same(broken.values(), before)), place
            broken.optimizer.zero_grad()
        if all(same(broken.values(), before)) and call == "step":
            with modes():
                broken.run(call)  # the optimizer works on
            assert all(same(broken.values(), after)), place


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_steps_under_any_default_device(perturbation, mode, backend, device):
    def stepped(context):
        found = Job(perturbation, backend, Injector())
        with context, MODES[mode]():
            for _ in range(2):
                found.run("step")
        return found

    expected = stepped(nullcontext())
    found = stepped(torch.device(device))
    assert all(same(found.values(), expected.values()))
    found.run("step")  # and outside, on what the optimizer keeps
    expected.run("step")
    assert all(same(found.values(), expected.values()))
    assert "skipped 0" in found.optimizer.report()


def test_nothing_frozen(perturbation, mode):
    """Plain MeZO: all weights require gradients."""
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_((model.weight * 2**6).round() / 2**6 + 0.0)
    before = model.weight.detach().clone()
    optimizer = HybridZOFO(
        model.parameters(), lr=0.0, mode="zo", perturbation=perturbation, mu=2.0**-7,
        distribution="rademacher",
    )  # fmt: skip
    with MODES[mode]():
        optimizer.step(lambda: model(torch.ones(2, 4)).square().sum())
    assert torch.equal(model.weight, before)
    assert optimizer.projected_grads.abs().min() > 0
    optimizer.step(lambda: model(torch.ones(2, 4)).square().sum())
    assert model.weight.grad is None
