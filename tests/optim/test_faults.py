"""Faults at any point of a step: nothing lost, nothing half-updated.

Weights and mu are such that in-place perturbation is exact, so that "as before" means the bits.
"""

import random
import signal

import pytest
import torch
from conftest import same_bits
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zofo_optim import HybridZOFO

POINTS = 60  # random places a case


@pytest.fixture(autouse=True)
def grad_mode():
    """Gradients are on after every fault, as they were before."""
    yield
    left_off = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not left_off


class Fault(Exception):
    pass


class At(TorchFunctionMode):
    """Calls ``fault`` at the n-th torch call within; counts the calls."""

    def __init__(self, place, fault):
        super().__init__()
        self.place, self.fault, self.calls = place, fault, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if self.calls == self.place:
            self.fault()
        return func(*args, **(kwargs or {}))


def raise_fault():
    raise Fault("at this point")


def out_of_memory():
    raise torch.OutOfMemoryError("in an evaluation")


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


class Job:
    """A small model on a grid, and what makes its state: weights, counters, momentum."""

    def __init__(self, perturbation, dtype, phases, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Linear(8, 1))
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_((p * 2**6).round() / 2**6 + 0.0)  # no -0, which no move restores
        for layer in (self.model[0], self.model[2]):
            layer.to(dtype).requires_grad_(False)
        self.dtype, self.phases = dtype, phases
        self.x, self.y = torch.randn(4, 8), torch.randn(4, 1)
        zo = dict(mode="zo", lr=1e-2, mu=2.0**-7)
        self.optimizer = HybridZOFO(
            [
                dict(zo, params=list(self.model[0].parameters())),
                dict(zo, params=list(self.model[2].parameters()), lr=3e-2),
                dict(params=list(self.model[3].parameters()), momentum=0.9, lr=1e-2),
            ],
            distribution="rademacher",
            perturbation=perturbation,
            **options,
        )

    def loss(self, around=None):
        h = self.x
        for layer in self.model:
            weight = getattr(layer, "weight", None)
            h = layer(h.to(weight.dtype)) if weight is not None else layer(h.float())
        return F.mse_loss(h, self.y)

    def run(self, closure):
        self.optimizer.zero_grad()
        if self.phases == 1:
            self.optimizer.step(closure)
        else:
            self.optimizer.backward(closure)
            self.optimizer.backward(closure)
            self.optimizer.step()

    def state(self):
        found = [p.detach().clone() for p in self.model.parameters()]
        momentum = [
            s["momentum_buffer"].clone()
            for s in self.optimizer.state.values()
            if s.get("momentum_buffer") is not None
        ]
        counters = [torch.tensor([float(g["zo_step"]) for g in self.optimizer.param_groups])]
        return found + momentum + counters


def equal(a, b):
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))


CASES = [
    dict(perturbation="in_place", dtype=torch.float32, phases=1),
    dict(perturbation="in_place", dtype=torch.float32, phases=2, estimator="one_sided"),
    dict(perturbation="in_place", dtype=torch.float32, phases=1, num_samples=2),
    dict(perturbation="streamed", dtype=torch.float32, phases=1),
    dict(perturbation="streamed", dtype=torch.bfloat16, phases=2, num_samples=2),
    dict(perturbation="streamed", dtype=torch.float16, phases=1, estimator="one_sided"),
]


def names(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@pytest.fixture(params=CASES, ids=names)
def case(request):
    return request.param


def at_work(case):
    """A job, its state, and its state after one more step.

    The first evaluations verify. In place they are a backward that is cleared, as weights are not
    on the grid after a step.
    """
    job, sound = Job(**case), Job(**case)
    for one in (job, sound):
        if case["perturbation"] == "streamed":
            one.run(one.loss)
        else:
            one.optimizer.backward(one.loss)
            one.optimizer.zero_grad()
    before = job.state()
    assert equal(before, sound.state())
    sound.run(sound.loss)
    return job, before, sound.state()


@pytest.mark.parametrize("fault", [raise_fault, out_of_memory])
def test_a_closure_that_raises(case, fault):
    """At any torch call of any evaluation; then the step, done again, is as if nothing was."""
    job, before, after = at_work(case)
    counter = At(0, fault)

    def counted():
        with counter:
            return job.loss()

    probe, _, _ = at_work(case)
    total = At(0, fault)

    def probing():
        with total:
            return probe.loss()

    probe.run(probing)
    assert total.calls > 20
    drawn = random.Random(1)
    for place in drawn.sample(range(1, total.calls + 1), min(POINTS, total.calls)):
        counter.calls, counter.place = 0, place
        with pytest.raises((Fault, torch.OutOfMemoryError)):
            job.run(counted)
        assert equal(job.state(), before)
    counter.place = 0
    job.run(counted)
    assert equal(job.state(), after)


def test_ctrl_c_at_any_torch_call(case):
    """In closures, between them, in the update: the step is undone, or done as a whole."""
    probe, _, _ = at_work(case)
    with At(0, ctrl_c) as counter:
        probe.run(probe.loss)
    assert counter.calls > 40
    drawn = random.Random(2)
    done = 0
    for place in drawn.sample(range(1, counter.calls + 1), min(POINTS, counter.calls)):
        job, before, after = at_work(case)
        with pytest.raises(KeyboardInterrupt), At(place, ctrl_c):
            job.run(job.loss)
        state = job.state()
        if equal(state, before):
            job.run(job.loss)
            assert equal(job.state(), after)
        else:
            assert equal(state, after)
            done += 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_not_finite(case, bad):
    """A bad perturbed loss drops its coefficient, a bad clean loss the whole step."""
    job, before, _ = at_work(case)
    job.run(lambda: job.loss() * bad)
    state = job.state()
    assert equal(state[:-1], before[:-1])  # all but the counters
    assert job.optimizer.skipped_steps > 0


def test_a_step_that_fails_leaves_first_order_as_it_was(case, monkeypatch):
    """The first-order step raises: zeroth-order weights are restored and not updated."""
    job, before, _ = at_work(case)

    def broken():
        raise Fault("first-order step")

    monkeypatch.setattr(job.optimizer._fo, "step", broken)
    with pytest.raises(Fault):
        job.run(job.loss)
    assert equal(job.state(), before)
