"""Losses that are not finite: what is skipped, counted, raised."""

import pytest
import torch
from toys import ESTIMATORS, Toy, assert_restored, equal, evaluations

from zofo_kernels import Direction, noise


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["zo", "hybrid"])
def test_a_bad_loss_at_any_evaluation_leaves_the_weights(mode, estimator, bad):
    """Without decay and without momentum either. A bad clean loss skips the FO step as well.

    Where only a perturbed loss is bad, the first-order gradients are good and are used.
    """
    options = {"estimator": estimator, "weight_decay": 0.1, "lr": 1e-2}
    if mode == "hybrid":
        options["momentum"] = 0.9
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
    last = evaluations("zo", estimator, 2) + 1  # the first step repeats one
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
    losses = iter((1e290, 1e290, -1e290, 1e300, -1e300))
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
            optimizer.step(toy)  # the first step evaluates once more
            optimizer.zero_grad()
            before, toy.calls = toy.values(), 0

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
