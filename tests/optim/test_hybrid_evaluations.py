"""Which evaluations a step makes, in which order, in one phase and in two."""

import warnings

import pytest
import torch
from torch.nn import Parameter
from toys import CONFIGURATIONS, ESTIMATORS, MODES, ULPS, Toy, assert_restored, equal, evaluations

from zofo_kernels import Direction, noise
from zofo_optim import HybridZOFO

# ---- evaluations ------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "estimator", "samples"), CONFIGURATIONS)
def test_number_of_evaluations(mode, estimator, samples):
    toy = Toy()
    optimizer = toy.optimizer(mode, estimator=estimator, num_samples=samples)
    count = evaluations(mode, estimator, samples)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.step(toy)
        assert toy.calls == (step + 1) * count + (mode != "fo")
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
    assert toy.calls == 3 + 1
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
    repeated, _ = points.pop(1)  # the first displaced point, once more
    assert equal(repeated, points[0][0])
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
    optimizer.add_param_group({"params": [late], "mode": "zo", "lr": 1e-3})
    before = toy.values()
    with pytest.raises(ValueError, match="accumulated estimates must have the same groups"):
        optimizer.backward(toy)
    assert_restored(toy, before, "hybrid")
    optimizer.zero_grad()
    optimizer.step(lambda: toy() + late.sum())
    assert not torch.equal(late, torch.ones(2))
