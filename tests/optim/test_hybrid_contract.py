"""What a step promises: which evaluations, in which order, and what it leaves behind."""

import functools
import itertools
import random
import signal
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Parameter

from zofo_kernels import Direction, noise
from zofo_optim import HybridZOFO, evaluation, hybrid_param_groups, perturbation

MODES = ("fo", "zo", "hybrid")
ESTIMATORS = ("one_sided", "two_sided")
# (mode, estimator, number of samples): every pattern of evaluations
CONFIGURATIONS = [
    ("fo", "two_sided", 3),
    *itertools.product(("zo", "hybrid"), ESTIMATORS, (1, 3)),
]
ULPS = {  # allowed distance of a restored weight in [1, 2), over all moves of a step
    torch.float64: 1e-15,
    torch.float32: 4 * 2.0**-23,
    torch.bfloat16: 0.0,
}


def evaluations(mode, estimator, samples):
    """How often a step evaluates its closure."""
    if mode == "fo":
        return 1
    if estimator == "one_sided":
        return 1 + samples
    return (mode == "hybrid") + 2 * samples


class Toy:
    """A frozen base x and an adapter y; weights in [1.2, 1.8], far from powers of two."""

    def __init__(self, dtype=torch.float64):
        self.x = Parameter(torch.linspace(1.2, 1.8, 12).reshape(3, 4).to(dtype))
        self.y = Parameter(torch.linspace(1.2, 1.8, 5).to(dtype))
        self.calls = 0

    def loss(self):
        return (self.x.double() ** 2).sum() * self.y.double().mean() + self.y.double().exp().sum()

    def __call__(self):
        self.calls += 1
        return self.loss()

    def optimizer(self, mode, **options):
        self.x.requires_grad_(mode == "fo")
        self.y.requires_grad_(mode != "zo")
        if mode != "hybrid":
            return HybridZOFO([self.x, self.y], mode=mode, **options)
        groups = [{"params": [self.x], "mode": "zo"}, {"params": [self.y], "mode": "fo"}]
        return HybridZOFO(groups, **options)

    def values(self):
        return [self.x.detach().clone(), self.y.detach().clone()]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_restored(toy, before, mode):
    """Zeroth-order weights to ULPS, first-order ones exactly."""
    dtype = toy.x.dtype
    for value, old, moved in zip(toy.values(), before, (mode != "fo", mode == "zo"), strict=True):
        torch.testing.assert_close(value, old, rtol=0, atol=ULPS[dtype] if moved else 0.0)


def random_states():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        [np.asarray(part).tolist() for part in np.random.get_state()],  # noqa: NPY002
    )


def seed_everything(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def draw():
    """Something from every global generator."""
    return torch.rand(()).item(), random.random(), float(np.random.rand())  # noqa: NPY002


def told(caught):
    return [str(w.message) for w in caught]


# ---- evaluations ------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "estimator", "samples"), CONFIGURATIONS)
def test_number_of_evaluations(mode, estimator, samples):
    toy = Toy()
    optimizer = toy.optimizer(mode, estimator=estimator, num_samples=samples)
    count = evaluations(mode, estimator, samples)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.step(toy)
        assert toy.calls == (step + 1) * count
    toy.calls = 0
    optimizer.backward(toy)
    assert toy.calls == count
    optimizer.step()
    assert toy.calls == count


def test_frozen_first_order_groups_and_empty_zeroth_order_groups_cost_nothing_more():
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    toy.y.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(toy)
    assert toy.calls == 3
    assert toy.y.grad is None


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["zo", "hybrid"])
def test_the_clean_evaluation_comes_first(mode, estimator):
    """With gradients only where there are first-order parameters; all others under no_grad."""
    toy, points = Toy(), []
    mu = 1e-2
    optimizer = toy.optimizer(mode, estimator=estimator, num_samples=2, mu=mu, seed=11)

    def closure():
        points.append((toy.values(), torch.is_grad_enabled()))
        return toy()

    start = toy.values()
    optimizer.step(closure)
    signs = {"one_sided": (1,), "two_sided": (1, -1)}[estimator]
    expected = [(s, sign) for s in range(2) for sign in signs]
    if mode == "hybrid" or estimator == "one_sided":
        (x, y), enabled = points.pop(0)
        assert enabled == (mode == "hybrid")
        assert equal([x, y], start)
    assert len(points) == len(expected)
    for ((x, y), enabled), (sample, sign) in zip(points, expected, strict=True):
        assert not enabled
        moved = [x, y] if mode == "zo" else [x]
        for index, value in enumerate(moved):
            z = noise(value.shape, Direction(11, 0, sample), index=index, dtype=torch.float64)
            torch.testing.assert_close(value, start[index] + sign * mu * z, rtol=0, atol=1e-14)
        if mode == "hybrid":
            assert torch.equal(y, start[1])


def test_first_order_gradients_are_those_of_the_clean_model():
    for estimator in ESTIMATORS:
        toy = Toy()
        optimizer = toy.optimizer("hybrid", estimator=estimator, num_samples=2, mu=0.1)
        (expected,) = torch.autograd.grad(toy.loss(), [toy.y])
        optimizer.backward(toy)
        assert torch.equal(toy.y.grad, expected)
        assert toy.x.grad is None
        optimizer.step()
        assert torch.equal(toy.y.grad, expected)


def test_both_parts_step_from_the_same_point():
    """x moves as in a ZO-only run with y fixed, y as in an FO-only run with x fixed."""
    toy = Toy()
    toy.optimizer("hybrid", lr=1e-3).step(toy)
    first, zeroth = Toy(), Toy()
    HybridZOFO([first.y], lr=1e-3).step(first)
    zeroth.x.requires_grad_(False)
    HybridZOFO([zeroth.x], lr=1e-3, mode="zo").step(zeroth)
    assert torch.equal(toy.y, first.y)
    torch.testing.assert_close(toy.x.detach(), zeroth.x.detach(), rtol=0, atol=1e-14)
    assert not torch.equal(toy.x, Toy().x)


# ---- two phases -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ULPS, ids=str)
@pytest.mark.parametrize(("mode", "estimator", "samples"), CONFIGURATIONS)
def test_two_phases_equal_one(mode, estimator, samples, dtype):
    """backward(closure); step() restores and then updates; step(closure) does both in one pass.

    The recovered weight is rounded to its dtype in either case, so the results are the same
    bits, although a backend may fuse the two.
    """
    one, two = Toy(dtype), Toy(dtype)
    options = {"estimator": estimator, "num_samples": samples, "lr": 1e-3, "mu": 1e-2}
    a = one.optimizer(mode, momentum=0.9, weight_decay=0.1, **options)
    b = two.optimizer(mode, momentum=0.9, weight_decay=0.1, **options)
    for _ in range(3):
        a.zero_grad()
        loss = a.step(one)
        b.zero_grad()
        before = two.values()
        assert torch.equal(b.backward(two), loss)
        assert_restored(two, before, mode)
        assert b.step() is None
        assert equal(one.values(), two.values())
    assert not equal(two.values(), Toy(dtype).values())


@pytest.mark.parametrize(("mode", "estimator", "samples"), CONFIGURATIONS)
def test_accumulated_micro_batches_equal_the_summed_loss(mode, estimator, samples):
    batches = [0.5, 2.0, -0.75]
    whole, parts = Toy(), Toy()
    options = {"estimator": estimator, "num_samples": samples, "momentum": 0.9}
    a, b = whole.optimizer(mode, **options), parts.optimizer(mode, **options)

    def loss(toy, weight):
        return weight * toy.loss() + (toy.x * weight).cos().sum()

    for _ in range(3):
        a.zero_grad()
        a.step(lambda: sum(loss(whole, w) for w in batches))
        b.zero_grad()
        for w in batches:
            b.backward(lambda w=w: loss(parts, w))
        b.step()
        # loss differences cancel: 1e-16 * loss / mu = 1e-12 of noise in a slope, times lr
        torch.testing.assert_close(whole.values(), parts.values(), rtol=0, atol=1e-11)
    assert not equal(parts.values(), Toy().values())


@pytest.mark.parametrize("mode", MODES)
def test_zero_grad_clears_gradients_and_coefficients(mode):
    once, twice = Toy(), Toy()
    a, b = once.optimizer(mode), twice.optimizer(mode)
    b.backward(lambda: 100 * twice.loss())
    b.zero_grad()
    with pytest.raises(RuntimeError, match=r"step\(\) needs a closure"):
        b.step()
    a.backward(once)
    b.backward(twice)
    a.step()
    b.step()
    torch.testing.assert_close(once.values(), twice.values(), rtol=0, atol=1e-13)
    with pytest.raises(RuntimeError, match=r"step\(\) needs a closure"):
        b.step()  # a step uses the coefficients up


@pytest.mark.parametrize("mode", MODES)
def test_without_zero_grad_gradients_and_coefficients_accumulate(mode):
    once, twice = Toy(), Toy()
    a, b = once.optimizer(mode), twice.optimizer(mode)
    a.step(lambda: 2 * once.loss())
    b.backward(twice)
    b.step(twice)
    torch.testing.assert_close(once.values(), twice.values(), rtol=0, atol=1e-11)


def test_accumulation_needs_the_same_groups():
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    optimizer.backward(toy)
    late = Parameter(torch.ones(2), requires_grad=False)
    optimizer.add_param_group({"params": [late], "mode": "zo"})
    before = toy.values()
    with pytest.raises(ValueError, match="accumulated estimates must have the same groups"):
        optimizer.backward(toy)
    assert_restored(toy, before, "hybrid")
    optimizer.zero_grad()
    optimizer.step(lambda: toy() + late.sum())
    assert not torch.equal(late, torch.ones(2))


# ---- what a closure may do --------------------------------------------------------------------


class Net(nn.Module):
    """A frozen layer, dropout, a trainable head; float64."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.base = nn.Linear(4, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 1, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
        self.base.requires_grad_(False)
        self.batch = torch.randn(8, 4, generator=generator, dtype=torch.float64)

    def forward(self):
        return self.head(self.base(self.batch).tanh()).square().mean()

    def values(self):
        return [p.detach().clone() for p in self.parameters()]

    def optimizer(self, **options):
        groups = hybrid_param_groups(self, zo={"lr": 1e-2}, fo={"lr": 1e-2}, verbose=False)
        return HybridZOFO(groups, momentum=0.9, **options)


def closure_styles(net, optimizer):
    def documented():
        optimizer.zero_grad()
        loss = net()
        loss.backward()
        return loss

    def model_zero_grad():
        net.zero_grad()
        loss = net()
        loss.backward()
        return loss

    def in_place_zero_grad():
        net.zero_grad(set_to_none=False)
        loss = net()
        loss.backward()
        return loss

    def functional_backward():
        optimizer.zero_grad()
        loss = net()
        torch.autograd.backward(loss)
        return loss.item()

    def backward_with_arguments():
        optimizer.zero_grad()
        loss = net()
        loss.backward(torch.ones_like(loss), retain_graph=True)
        return loss.detach()

    def two_losses():
        optimizer.zero_grad()
        loss = net()
        parts = [loss * 0.25, loss * 0.75]
        torch.autograd.backward(parts)
        return sum(parts)

    def re_enables_gradients():
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = net()
            loss.backward()
        return loss

    return [f for name, f in locals().items() if name not in ("net", "optimizer")]


STYLES = [
    "documented",
    "model_zero_grad",
    "in_place_zero_grad",
    "functional_backward",
    "backward_with_arguments",
    "two_losses",
    "re_enables_gradients",
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("style", range(len(STYLES)), ids=STYLES)
def test_closure_styles_are_the_same(style, estimator):
    plain, net = Net(), Net()
    expected = plain.optimizer(estimator=estimator, num_samples=2)
    optimizer = net.optimizer(estimator=estimator, num_samples=2)
    closure = closure_styles(net, optimizer)[style]
    for _ in range(4):
        expected.zero_grad()
        expected.step(plain)
        optimizer.step(closure)
        assert net.base.weight.grad is None
        torch.testing.assert_close(net.values(), plain.values(), rtol=0, atol=1e-13)
    assert not equal(net.values(), Net().values())
    gradients, wanted = ([p.grad for p in m.head.parameters()] for m in (net, plain))
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-13)
    assert all(g.abs().max() > 0 for g in gradients)


def test_gradient_tensors_stay_the_same_objects():
    """A view of .grad that a user holds is not replaced by the repeated evaluations."""
    net = Net()
    optimizer = net.optimizer()
    optimizer.step(net)
    held = net.head.weight.grad

    def closure():
        net.zero_grad(set_to_none=False)
        loss = net()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert net.head.weight.grad is held
    assert held.abs().max() > 0


def test_zero_grad_is_ignored_in_repeated_evaluations():
    """Whatever was accumulated before stays, although the repetitions run zero_grad again."""
    toy, plain = Toy(), Toy()
    for one in (toy, plain):
        optimizer = one.optimizer("hybrid", estimator="one_sided", num_samples=2)
        optimizer.backward(one)
        one.calls = 0

        def closure(one=one, optimizer=optimizer):
            loss = one()
            if one is toy and one.calls > 1:
                optimizer.zero_grad()
                optimizer.zero_grad(set_to_none=False)
            return loss

        optimizer.step(closure)
        assert one.y.grad is not None
    assert equal(toy.values(), plain.values())
    single = Toy()
    single.optimizer("hybrid", estimator="one_sided", num_samples=2).step(single)
    assert not torch.allclose(toy.x, single.x, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", ["step", "backward"])
def test_a_closure_must_not_step_the_optimizer(mode, call):
    for k in range(1, evaluations(mode, "two_sided", 1) + 1):
        toy = Toy()
        optimizer = toy.optimizer(mode)
        before = toy.values()

        def closure(toy=toy, optimizer=optimizer, k=k):
            loss = toy()
            if toy.calls == k:
                getattr(optimizer, call)(toy.loss)
            return loss

        with pytest.raises(RuntimeError, match="must not step the optimizer that is evaluating"):
            optimizer.step(closure)
        assert_restored(toy, before, mode)
        toy.calls = -99
        optimizer.zero_grad()
        optimizer.step(closure)  # usable afterwards
        assert not equal(toy.values(), before)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loss_may_live_in_memory_that_the_next_evaluation_overwrites(estimator):
    """A view of a weight, a buffer of the model, the static output of a captured graph."""
    x = Parameter(torch.tensor([1.5, 1.25], dtype=torch.float64), requires_grad=False)
    buffer = torch.zeros((), dtype=torch.float64)
    closures = (lambda: x[0] * 1, lambda: x[0], lambda: buffer.copy_(x[0]))
    slopes = []
    for closure in closures:
        optimizer = HybridZOFO([x], mode="zo", lr=0.0, estimator=estimator)
        optimizer.step(closure)
        slopes.append(optimizer.projected_grads.item())
    z = noise((2,), Direction(0, 0, 0), dtype=torch.float64)
    assert slopes == pytest.approx(3 * [z[0].item()], rel=1e-9)


def test_a_closure_may_step_another_optimizer():
    """Two players, each with an optimizer of its own."""
    toy, other = Toy(), Toy()
    inner, optimizer = other.optimizer("zo"), toy.optimizer("zo")

    def closure():
        inner.step(other)
        return toy()

    optimizer.step(closure)
    assert other.calls == 4
    alone = Toy()
    alone.optimizer("zo").step(alone)
    assert equal(toy.values(), alone.values())


# ---- exceptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ULPS, ids=str)
@pytest.mark.parametrize(("mode", "estimator", "samples"), CONFIGURATIONS)
def test_an_exception_at_any_evaluation_restores_everything(mode, estimator, samples, dtype):
    options = {"estimator": estimator, "num_samples": samples, "momentum": 0.9, "mu": 1e-2}
    for k in range(1, evaluations(mode, estimator, samples) + 1):
        for error in (ValueError, KeyboardInterrupt, SystemExit):
            for call in ("step", "backward"):
                toy, drawn = Toy(dtype), []
                optimizer = toy.optimizer(mode, **options)
                before = toy.values()

                def closure(toy=toy, drawn=drawn, k=k, error=error):
                    drawn.append(draw())
                    loss = toy()
                    if toy.calls == k:
                        raise error("at evaluation", k)
                    draw()
                    return loss

                seed_everything(4)
                with pytest.raises(error, match=f"at evaluation.*{k}"):
                    getattr(optimizer, call)(closure)
                assert_restored(toy, before, mode)
                assert toy.calls == k
                assert len(set(drawn)) == 1
                after = random_states()
                seed_everything(4)
                draw()  # at the first evaluation the closure got no further than this
                if k > 1:
                    draw()
                assert after == random_states()
                assert len(optimizer.state) == 0
                assert all(group["zo_step"] == 0 for group in optimizer.param_groups)
                with pytest.raises(RuntimeError, match=r"step\(\) needs a closure"):
                    optimizer.step()
        toy.calls = -99
        twin = Toy(dtype)
        optimizer.zero_grad()
        optimizer.step(closure)
        twin.optimizer(mode, **options).step(twin)
        atol = 1e-9 if dtype == torch.float64 else 1e-3  # the restored weight is an ulp off
        torch.testing.assert_close(toy.values(), twin.values(), rtol=0, atol=atol)
        assert not equal(toy.values(), before)


def test_an_exception_leaves_the_first_gradients():
    """As with any closure that fails after backward: the gradients are there, no step is."""
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    (expected,) = torch.autograd.grad(toy.loss(), [toy.y])

    def closure():
        loss = toy()
        if toy.calls == 3:
            raise ValueError("third")
        return loss

    with pytest.raises(ValueError, match="third"):
        optimizer.step(closure)
    assert torch.equal(toy.y.grad, expected)


def test_a_failing_first_order_step_restores_the_weights():
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    optimizer.param_groups[1]["lr"] = "fast"
    before = toy.values()
    with pytest.raises(TypeError):
        optimizer.step(toy)
    assert_restored(toy, before, "hybrid")


def test_a_hook_that_raises_leaves_the_weights():
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    before = toy.values()

    def hook(*_):
        raise KeyError("pre")

    optimizer.register_step_pre_hook(hook)
    with pytest.raises(KeyError, match="pre"):
        optimizer.step(toy)
    assert equal(toy.values(), before)
    assert toy.calls == 0


@pytest.mark.parametrize("call", ["step", "backward"])
def test_ctrl_c_while_weights_are_written_restores_all_groups(call, monkeypatch):
    """SIGINT is held back during a pass and raised after it, here in every pass of a step."""
    original, left = perturbation.perturb_, []

    def interrupted(*args, **options):
        original(*args, **options)
        if left and left.pop() == "last":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(perturbation, "perturb_", interrupted)
    hit = 0
    for k in range(1, 7):
        toy = Toy()
        before, left[:] = toy.values(), ["last", *range(k - 1)]
        optimizer = HybridZOFO([{"params": [toy.x]}, {"params": [toy.y]}], mode="zo")
        try:
            getattr(optimizer, call)(toy)
        except KeyboardInterrupt:
            hit += 1
            assert_restored(toy, before, "zo")
    # two groups, two moves; backward() also restores them, step() does that in its update
    assert hit == {"step": 4, "backward": 6}[call]


def test_ctrl_c_between_evaluations_leaves_a_usable_optimizer(monkeypatch):
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    restore = evaluation.GlobalRandomState.restore

    def interrupted(state):
        monkeypatch.setattr(evaluation.GlobalRandomState, "restore", restore)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.GlobalRandomState, "restore", interrupted)
    before = toy.values()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(toy)
    assert_restored(toy, before, "hybrid")
    optimizer.zero_grad()
    optimizer.step(toy)
    assert not equal(toy.values(), before)


# ---- losses that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["zo", "hybrid"])
def test_a_bad_loss_at_any_evaluation_leaves_the_weights(mode, estimator, bad):
    """Without decay and without momentum either. A bad clean loss skips the FO step as well.

    Where only a perturbed loss is bad, the first-order gradients are good and are used.
    """
    options = {"estimator": estimator, "momentum": 0.9, "weight_decay": 0.1, "lr": 1e-2}
    for k in range(1, evaluations(mode, estimator, 1) + 1):
        toy = Toy()
        optimizer = toy.optimizer(mode, **options)
        optimizer.zero_grad()
        optimizer.step(toy)  # so that there is momentum
        before, toy.calls = toy.values(), 0
        momentum = {p: s["momentum_buffer"].clone() for p, s in optimizer.state.items()}

        def closure(toy=toy, k=k):
            loss = toy()
            return loss * bad if toy.calls == k else loss

        optimizer.zero_grad()
        optimizer.step(closure)
        assert optimizer.skipped_steps == 1
        assert optimizer.projected_grads.tolist() == [[0.0]]
        if mode == "hybrid" and k > 1:
            twin = Toy()
            expected = twin.optimizer(mode, **options)
            for _ in range(2):
                expected.zero_grad()
                expected.step(twin)
                with torch.no_grad():
                    twin.x.copy_(before[0])
            torch.testing.assert_close(toy.y.detach(), twin.y.detach(), rtol=0, atol=1e-14)
            assert not torch.equal(toy.y, before[1])
            before[1] = toy.y.detach().clone()
        else:
            assert all(
                torch.equal(optimizer.state[p]["momentum_buffer"], momentum[p]) for p in momentum
            )
        assert_restored(toy, before, mode)
        optimizer.zero_grad()
        optimizer.step(toy)
        assert optimizer.skipped_steps == 1
        assert all(v.isfinite().all() for v in toy.values())
        assert not torch.equal(toy.x, before[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_bad_direction_counts_as_zero_among_several(estimator):
    """The average is still over all of them."""
    toy = Toy()
    optimizer = toy.optimizer("zo", estimator=estimator, num_samples=2, lr=1.0, seed=3)
    last = evaluations("zo", estimator, 2)
    before = toy.values()

    def closure():
        loss = toy()
        return loss * torch.nan if toy.calls == last else loss

    optimizer.step(closure)
    coefficient, zero = optimizer.projected_grads[0].tolist()
    assert zero == 0.0
    assert coefficient != 0.0
    assert optimizer.skipped_steps == 1
    for index, (value, old) in enumerate(zip(toy.values(), before, strict=True)):
        z = noise(value.shape, Direction(3, 0, 0), index=index, dtype=torch.float64)
        torch.testing.assert_close(value, old - coefficient / 2 * z, rtol=1e-9, atol=1e-12)


def test_overflow_of_a_slope_counts_too():
    """Finite losses whose difference, divided by mu, is not."""
    toy = Toy()
    optimizer = toy.optimizer("zo", mu=1e-10)
    losses = iter((1e290, -1e290, 1e300, -1e300))
    optimizer.step(lambda: next(losses))
    assert optimizer.skipped_steps == 0
    before = toy.values()
    optimizer.step(lambda: next(losses))
    assert optimizer.skipped_steps == 1
    assert_restored(toy, before, "zo")


@pytest.mark.parametrize("mode", ["zo", "hybrid"])
def test_nonfinite_raise(mode):
    for estimator in ESTIMATORS:
        for k in range(1, evaluations(mode, estimator, 2) + 1):
            toy = Toy()
            optimizer = toy.optimizer(
                mode, nonfinite="raise", estimator=estimator, num_samples=2, weight_decay=0.1
            )
            before = toy.values()

            def closure(toy=toy, k=k):
                loss = toy()
                return loss * torch.inf if toy.calls == k else loss

            with pytest.raises(FloatingPointError, match="closure must return finite losses"):
                optimizer.step(closure)
            assert_restored(toy, before, mode)
            optimizer.zero_grad()
            optimizer.step(closure)
            assert not equal(toy.values(), before)


def test_first_order_only_treats_nan_as_torch_does():
    toy, twin = Toy(), Toy()
    toy.optimizer("fo").step(lambda: toy.loss() * torch.nan)
    (twin.loss() * torch.nan).backward()
    torch.optim.SGD([twin.x, twin.y]).step()
    assert toy.y.isnan().all()
    assert twin.y.isnan().all()


# ---- randomness -------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "estimator", "samples"), CONFIGURATIONS)
def test_the_random_state_is_as_after_one_evaluation(mode, estimator, samples):
    for phases in ("one", "two"):
        toy, drawn = Toy(), []
        optimizer = toy.optimizer(mode, estimator=estimator, num_samples=samples)

        def closure(toy=toy, drawn=drawn):
            drawn.append(draw())
            return toy() * drawn[-1][0]

        seed_everything(8)
        for step in range(2):
            optimizer.zero_grad()
            if phases == "one":
                optimizer.step(closure)
            else:
                optimizer.backward(closure)
                optimizer.step()
            after = random_states()
            seed_everything(8)
            expected = [draw() for _ in range(step + 1)]
            assert after == random_states()
        count = evaluations(mode, estimator, samples)
        assert drawn == [expected[0]] * count + [expected[1]] * count
        assert expected[0] != expected[1]


@pytest.mark.parametrize("mode", MODES)
def test_the_optimizer_draws_nothing_itself(mode):
    seed_everything(9)
    before = random_states()
    toy = Toy(torch.bfloat16)  # with stochastic rounding
    optimizer = toy.optimizer(mode)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(toy)
    assert random_states() == before


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", MODES)
def test_dropout_masks_are_the_same_in_every_evaluation(mode, estimator):
    net, masks = Net(), []
    net.requires_grad_(mode == "fo")
    net.head.requires_grad_(mode != "zo")
    if mode == "hybrid":
        optimizer = net.optimizer(estimator=estimator, num_samples=2)
    else:
        optimizer = HybridZOFO(net.parameters(), mode=mode, estimator=estimator, num_samples=2)

    def closure():
        masks.append(F.dropout(torch.ones(64), 0.5))
        return net() * masks[-1].mean()

    torch.manual_seed(6)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(closure)
    count = evaluations(mode, estimator, 2)
    assert len(masks) == 2 * count
    assert all(torch.equal(m, masks[0]) for m in masks[:count])
    assert all(torch.equal(m, masks[-1]) for m in masks[count:])
    assert not torch.equal(masks[0], masks[-1])


@pytest.mark.parametrize("mode", ["zo", "hybrid"])
def test_seeds_select_the_path(mode):
    def path(seed, torch_seed):
        seed_everything(torch_seed)
        toy = Toy()
        optimizer = toy.optimizer(mode, seed=seed)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(toy)
        return toy.values()

    expected = path(1, 1)
    assert equal(path(1, 2), expected)
    for other in (0, 2, (1 << 64) - 1):
        assert not torch.equal(path(other, 1)[0], expected[0])


def test_every_step_has_directions_of_its_own():
    points = []
    x = Parameter(torch.zeros(16, dtype=torch.float64))
    optimizer = HybridZOFO([x], mode="zo", mu=1.0, lr=0.0, estimator="one_sided", num_samples=2)

    def closure():
        points.append(x.detach().clone())
        return x.sum()

    for _ in range(3):
        optimizer.step(closure)
    drawn = [p for i, p in enumerate(points) if i % 3]
    assert len(drawn) == 6
    for a, b in itertools.combinations(drawn, 2):
        assert (a - b).abs().min() > 0 or (a - b).abs().max() > 0.1
        assert not torch.allclose(a, b, atol=1e-3)


# ---- warnings ---------------------------------------------------------------------------------


def test_warns_once_of_16_bit_losses():
    for mode, dtype, expected in (
        ("zo", torch.bfloat16, 1),
        ("hybrid", torch.float16, 1),
        ("fo", torch.bfloat16, 0),
        ("zo", torch.float32, 0),
    ):
        toy = Toy(torch.float32)
        optimizer = toy.optimizer(mode)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.zero_grad()
                optimizer.step(lambda toy=toy, dtype=dtype: (toy.loss() / 100).to(dtype))
        assert len(caught) == expected
        assert optimizer.last_loss.dtype == torch.float32  # differences are taken in it
        if expected:
            assert f"closure returned a loss of dtype {dtype}" in told(caught)[0]
            assert "float32" in told(caught)[0]


def test_warns_once_of_gradients_that_nothing_uses():
    x, z, y = (Parameter(torch.ones(2)) for _ in range(3))
    z.requires_grad_(False)
    zeroth = {"params": [("base.x", x), ("base.z", z)], "mode": "zo"}
    optimizer = HybridZOFO([zeroth, {"params": [("y", y)]}])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(lambda: (x * y * z).sum())
    assert len(caught) == 1
    assert "1 zeroth-order parameters have requires_grad=True" in told(caught)[0]
    assert "base.x" in told(caught)[0]
    assert "base.z" not in told(caught)[0]
    with warnings.catch_warnings():  # nothing is computed for them without an FO backward
        warnings.simplefilter("error")
        HybridZOFO([x], mode="zo").step(lambda: x.sum())


def test_warns_once_of_a_flat_loss_and_names_the_parameters():
    toy = Toy()
    unused = Parameter(torch.ones(3), requires_grad=False)
    for estimator in ESTIMATORS:
        for second in (False, True):
            groups = [("never.used", unused), ("nor.this", Parameter(torch.ones(1)))]
            toy.y.requires_grad_(True)
            optimizer = HybridZOFO(
                [{"params": groups[: 1 + second], "mode": "zo"}, {"params": [("y", toy.y)]}],
                estimator=estimator,
            )
            groups[1][1].requires_grad_(False)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for step in range(12):
                    optimizer.zero_grad()
                    optimizer.step(toy)
                    assert len(caught) == (step >= 4)
            (message,) = told(caught)
            assert "bit-identical under perturbation for 5 steps" in message
            assert "never.used" in message
            assert ("nor.this" in message) == second


def test_unnamed_parameters_are_named_by_number_and_shape():
    x, y = Parameter(torch.ones(3, 2)), Parameter(torch.ones(5))
    optimizer = HybridZOFO([{"params": [x]}, {"params": [y]}], mode="zo")
    with pytest.warns(UserWarning, match=r"parameter 0 \(3, 2\), parameter 1 \(5,\)"):
        run(optimizer, lambda: 1.0, 5)


def run(optimizer, closure, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step(closure)


def test_no_warning_while_the_loss_moves():
    """Also not if it is flat now and then, or if slopes cancel around a minimum."""
    x = Parameter(torch.ones(3).double())
    optimizer = HybridZOFO([x], mode="zo", lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            run(optimizer, lambda: 1.0, 4)
            run(optimizer, lambda: x.sum(), 1)
        run(optimizer, lambda: x.sum(), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy = Toy()
        run(toy.optimizer("hybrid"), toy, 20)


def test_warns_once_of_a_loss_without_a_graph():
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(optimizer, lambda: toy.loss().item(), 3)
    assert len(caught) == 1
    assert "without a graph" in told(caught)[0]
    assert torch.equal(toy.y, Toy().y)
    assert not torch.equal(toy.x, Toy().x)


@pytest.mark.parametrize("phases", ["step", "backward"])
@pytest.mark.parametrize("topic", ["16-bit", "graph", "requires_grad", "flat"])
def test_warnings_point_at_the_callers_line(topic, phases):
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    toy.x.requires_grad_(topic == "requires_grad")
    closure = {
        "16-bit": lambda: (toy.loss() / 100).bfloat16(),
        "graph": lambda: toy.loss().detach(),
        "requires_grad": toy.loss,
        "flat": lambda: toy.y.sum(),
    }[topic]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            optimizer.zero_grad()
            getattr(optimizer, phases)(closure)
    assert {w.filename for w in caught} == {__file__}


# ---- parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["zo", "hybrid"])
def test_no_gradients_are_made_for_frozen_parameters(mode, estimator):
    toy = Toy()
    optimizer = toy.optimizer(mode, estimator=estimator)
    run(optimizer, toy, 3)
    assert toy.x.grad is None
    assert not toy.x.requires_grad
    assert (toy.y.grad is None) == (mode == "zo")
    assert toy.y.requires_grad == (mode == "hybrid")
    assert len(optimizer.state) == 0


def test_gradients_of_zeroth_order_parameters_are_left_alone():
    """ZO-only: a gradient that is there already is neither used nor changed by a step."""
    toy = Toy()
    optimizer = HybridZOFO([toy.x, toy.y], mode="zo")
    toy.x.grad = torch.full_like(toy.x, 1e6)
    optimizer.step(toy)
    assert (toy.x.grad == 1e6).all()
    assert (toy.x - Toy().x).abs().max() < 1


def test_weights_of_any_shape_and_layout():
    shapes = {"scalar": (), "empty": (0, 3), "one": (1, 1), "cube": (2, 3, 4)}
    params = {k: Parameter(torch.full(s, 1.5), requires_grad=False) for k, s in shapes.items()}

    def grid(*shape):
        return torch.linspace(1.2, 1.8, torch.Size(shape).numel()).reshape(shape)

    dense = {
        "transposed": grid(4, 3).t(),
        "strided": grid(4, 6)[:, ::2],
        "channels last": grid(1, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    }
    strided = {k: Parameter(v, requires_grad=False) for k, v in dense.items()}
    plain = {k: Parameter(v.clone().contiguous(), requires_grad=False) for k, v in dense.items()}
    assert not any(p.is_contiguous() for p in strided.values())

    def train(chosen):
        others = [Parameter(p.detach().clone(), requires_grad=False) for p in params.values()]
        every = [*others, *chosen]
        optimizer = HybridZOFO(every, mode="zo", lr=1e-2)
        run(optimizer, lambda: sum(p.double().square().sum() for p in every), 4)
        return every

    left, right = train(strided.values()), train(plain.values())
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)
    for p, start in zip(left, params.values(), strict=False):
        assert p.shape == start.shape
        assert p.numel() == 0 or not torch.equal(p, start)
    assert not strided["transposed"].is_contiguous()


def test_strided_views_leave_their_neighbours():
    whole = torch.ones(4, 6)
    optimizer = HybridZOFO([whole[:, ::2]], mode="zo", lr=1e-2)
    view = optimizer.param_groups[0]["params"][0]
    run(optimizer, lambda: view.square().sum(), 3)
    assert (whole[:, 1::2] == 1).all()
    assert (whole[:, ::2] != 1).all()


def test_dtypes_may_be_mixed():
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    params = [Parameter(torch.full((7,), 1.5, dtype=d), requires_grad=False) for d in dtypes]
    start = [p.clone() for p in params]
    optimizer = HybridZOFO(params, mode="zo", lr=1e-3, mu=1e-2)
    points = []

    def closure():
        points.append([p.detach().clone().double() for p in params])
        return sum(p.double().square().sum() for p in params)

    optimizer.step(closure)
    for index, dtype in enumerate(dtypes):
        z = noise((7,), Direction(0, 0, 0), index=index)
        expected = (1.5 + 1e-2 * z.double()).to(dtype)
        torch.testing.assert_close(points[0][index], expected.double(), rtol=0, atol=2e-7)
        assert params[index].dtype == dtype
        assert not torch.equal(params[index], start[index])


def test_rounding_is_stochastic_unless_nearest_is_asked_for():
    """An update of a tenth of an ulp: nearest loses all of it, stochastic keeps its mean."""
    moved = {}
    for rounding in ("stochastic", "nearest"):
        x = Parameter(torch.full((2000,), 1.5, dtype=torch.bfloat16), requires_grad=False)
        optimizer = HybridZOFO([x], mode="zo", lr=0.0, weight_decay=1.0, rounding=rounding)
        optimizer.param_groups[0]["lr"] = 0.1 * 2.0**-7 / 1.5
        optimizer.step(lambda: 1.0)
        moved[rounding] = (1.5 - x.double()) * 2**7
    assert (moved["nearest"] == 0).all()
    assert set(moved["stochastic"].tolist()) == {0.0, 1.0}
    assert moved["stochastic"].mean().item() == pytest.approx(0.1, abs=0.03)


def test_the_distribution_is_the_one_asked_for():
    moved = {}
    for distribution in ("gaussian", "rademacher"):
        x = Parameter(torch.zeros(64, dtype=torch.float64), requires_grad=False)
        optimizer = HybridZOFO([x], mode="zo", distribution=distribution, lr=1.0, mu=0.25)
        optimizer.step(lambda x=x: 2 * x[0])
        moved[distribution] = len(x.abs().unique())
    assert moved == {"gaussian": 64, "rademacher": 1}


def test_the_backend_is_the_one_asked_for(monkeypatch):
    from zofo_kernels import reference

    used = []
    for name in ("perturb", "update"):
        original = getattr(reference, name)
        spy = (lambda f, n: lambda *args: (used.append(n), f(*args))[1])(original, name)
        monkeypatch.setattr(reference, name, spy)
    toy = Toy()
    toy.optimizer("zo", backend="reference").step(toy)
    assert used == ["perturb", "perturb", "update"]


def test_duplicates_count_once():
    a, b = (Parameter(torch.linspace(1, 2, 6).double(), requires_grad=False) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = HybridZOFO([a, a], mode="zo")
    once = HybridZOFO([b], mode="zo")
    run(twice, lambda: a.square().sum(), 3)
    run(once, lambda: b.square().sum(), 3)
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.linspace(1, 2, 6).double())


def test_shared_memory_is_refused():
    p = Parameter(torch.ones(4), requires_grad=False)
    other = Parameter(p.data, requires_grad=False)
    groups = [{"params": [("a", p)]}, {"params": [("b", other)]}]
    for given in ([("a", p), ("b", other)], groups):
        with pytest.raises(ValueError, match="parameters 'a' and 'b' share memory"):
            HybridZOFO(given, mode="zo")
    with pytest.raises(ValueError, match="share memory"):
        HybridZOFO([torch.ones(1).expand(4)], mode="zo")
    HybridZOFO([Parameter(torch.empty(0)), Parameter(torch.empty(0))], mode="zo")


def test_groups_of_different_mu_move_together():
    """Each sees the common loss difference over its own mu."""
    x, y = (Parameter(torch.ones(4).double(), requires_grad=False) for _ in range(2))
    groups = [{"params": [x], "mu": 1e-3}, {"params": [y], "mu": 4e-3}]
    optimizer = HybridZOFO(groups, mode="zo", lr=1.0, seed=2)
    optimizer.step(lambda: 3 * x.sum() + y.sum())
    z = [noise((4,), Direction(2, 0, 0), index=i, dtype=torch.float64) for i in range(2)]
    difference = 1e-3 * 3 * z[0].sum() + 4e-3 * z[1].sum()
    expected = torch.stack([difference / 1e-3, difference / 4e-3]).reshape(2, 1)
    torch.testing.assert_close(optimizer.projected_grads, expected, rtol=1e-9, atol=1e-12)
    for p, c, v in zip((x, y), expected, z, strict=True):
        torch.testing.assert_close(p.detach(), 1 - c * v, rtol=1e-9, atol=1e-11)


# ---- other people's loops ---------------------------------------------------------------------


def test_accelerate_runs_the_same_path():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net, plain = Net(), Net()
    prepared, optimizer = accelerator.prepare(net, net.optimizer())
    expected = plain.optimizer()

    def closure():
        optimizer.zero_grad()
        loss = prepared()
        accelerator.backward(loss)
        return loss

    for _ in range(4):
        optimizer.step(closure)
        expected.zero_grad()
        expected.step(plain)
    assert equal(net.values(), plain.values())
    assert not equal(net.values(), Net().values())


def test_a_grad_scaler_loop_in_two_phases():
    """Scale inside the closure, return the loss itself: then only FO gradients are scaled."""
    net, plain = Net(), Net()
    optimizer, expected = net.optimizer(), plain.optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)

    def closure():
        optimizer.zero_grad()
        loss = net()
        scaler.scale(loss).backward()
        return loss

    for step in range(4):
        optimizer.backward(closure)
        if step % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1e3)
        scaler.step(optimizer)
        scaler.update()
        expected.zero_grad()
        expected.step(plain)
    assert equal(net.values(), plain.values())
    assert not equal(net.values(), Net().values())
    assert scaler.get_scale() == 2.0**14


def test_a_grad_scaler_that_finds_inf_skips_the_whole_step():
    net = Net()
    optimizer = net.optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before = net.values()

    def closure():
        optimizer.zero_grad()
        loss = net()
        (scaler.scale(loss) * 1e308).backward()
        return loss

    optimizer.backward(closure)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(net.values(), before, rtol=0, atol=1e-15)
    assert scaler.get_scale() == 2.0**11


def test_clipping_between_the_phases():
    net, plain = Net(), Net()
    optimizer, expected = net.optimizer(), plain.optimizer()
    optimizer.backward(net)
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    assert norm > 1e-3
    optimizer.step()
    expected.step(plain)
    moved = [(p - q).abs().max() for p, q in zip(net.values(), Net().values(), strict=True)]
    assert max(moved[2:]) <= 1e-3 * 1e-2
    torch.testing.assert_close(net.values()[:2], plain.values()[:2], rtol=0, atol=1e-14)


def test_a_compiled_model_in_the_closure():
    """Captured once with gradients and once without, not again in every step."""
    testing = pytest.importorskip("torch._dynamo.testing")
    counter = testing.CompileCounterWithBackend("aot_eager")  # needs no compiler
    net, plain = Net(), Net()
    optimizer, expected = net.optimizer(), plain.optimizer()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(net, backend=counter)
        for _ in range(4):
            optimizer.zero_grad()
            optimizer.step(compiled)
            expected.zero_grad()
            expected.step(plain)
    finally:
        torch._dynamo.reset()
    assert counter.frame_count == 2
    torch.testing.assert_close(net.values(), plain.values(), rtol=1e-9, atol=1e-12)
    assert not equal(net.values(), Net().values())


def test_activation_checkpointing():
    """Recomputation in backward happens at the clean weights, before anything is perturbed."""
    net, plain = Net(), Net()
    optimizer, expected = net.optimizer(num_samples=2), plain.optimizer(num_samples=2)

    def closure():
        hidden = torch.utils.checkpoint.checkpoint(
            lambda b: net.base(b).tanh(), net.batch.requires_grad_(True), use_reentrant=False
        )
        return net.head(hidden).square().mean()

    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(closure)
        expected.zero_grad()
        expected.step(plain)
    torch.testing.assert_close(net.values(), plain.values(), rtol=0, atol=1e-13)


def test_threads_may_step_optimizers_of_their_own():
    """SIGINT handling is for the main thread only; elsewhere a step must simply work."""
    import threading

    toys, failures = [Toy() for _ in range(3)], []

    def work(toy):
        try:
            run(toy.optimizer("zo"), toy, 3)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(toy,)) for toy in toys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    alone = Toy()
    run(alone.optimizer("zo"), alone, 3)
    assert all(equal(toy.values(), alone.values()) for toy in toys)


def test_loading_a_state_dict_drops_what_was_accumulated():
    """Coefficients belong to the directions of the step that is left."""
    x = torch.ones(3)
    optimizer = HybridZOFO([x], mode="zo")
    state = optimizer.state_dict()
    optimizer.backward(lambda: (x**2).sum())
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()


def test_an_outer_autocast_block_does_not_hide_perturbations():
    """Autocast caches 16-bit copies of weights that require gradients."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 1)
    x = torch.randn(16, 8)
    optimizer = HybridZOFO(layer.parameters(), mode="zo", mu=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(lambda: layer(x).float().square().mean())
    assert optimizer.projected_grads.item() != 0


def test_what_fo_optimizer_binds_stays_out_of_zeroth_order_groups():
    bound = functools.partial(torch.optim.AdamW, lr=0.5, weight_decay=0.1)
    x, y = torch.ones(2), torch.ones(2, requires_grad=True)
    groups = [{"params": [x], "mode": "zo"}, {"params": [y]}]
    zo, fo = HybridZOFO(groups, fo_optimizer=bound).param_groups
    assert (zo["lr"], zo["weight_decay"]) == (1e-3, 0)
    assert (fo["lr"], fo["weight_decay"]) == (0.5, 0.1)


def test_a_factory_with_open_options_gets_the_learning_rate():
    y = torch.ones(2, requires_grad=True)
    optimizer = HybridZOFO([y], lr=0.5, fo_optimizer=lambda p, **o: torch.optim.AdamW(p, **o))
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_trainer_training_step_can_be_the_closure(tmp_path):
    """Hugging Face's Trainer.training_step runs the backward pass itself, through accelerate."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, max_position_embeddings=32, hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    model.bert.requires_grad_(False)
    batch = {"input_ids": torch.randint(0, 50, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}
    args = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model=model, args=args)
    trainer.current_gradient_accumulation_steps = 1  # as train() sets it
    base = [p for p in model.parameters() if not p.requires_grad]
    head = [p for p in model.parameters() if p.requires_grad]
    before = [p.clone() for p in (*base, *head)]
    groups = [{"params": base, "mode": "zo", "lr": 1e-2}, {"params": head, "lr": 0.1}]
    optimizer = HybridZOFO(groups)
    loss = optimizer.step(lambda: trainer.training_step(model, dict(batch)))
    assert loss.isfinite()
    assert optimizer.projected_grads.item() != 0
    assert all(p.grad is None for p in base)
    assert all(p.grad is not None for p in head)
    # position embeddings past the batch's length move too: every element has its direction
    assert not any(torch.equal(p, old) for p, old in zip((*base, *head), before, strict=True))
