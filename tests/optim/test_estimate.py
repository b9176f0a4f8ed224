"""Estimates: from losses to coefficients, their sums, and what becomes of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from zofo_kernels import Direction, Weights
from zofo_optim.estimate import Estimate
from zofo_optim.estimators import ESTIMATORS
from zofo_optim.rule_states import keep, saved, shaped
from zofo_optim.rules import SGD, Normalized
from zofo_optim.zo_groups import ZOGroup

NAN, INF = float("nan"), float("inf")
finite = st.floats(-100, 100)


def of(losses, *, estimator="two_sided", samples=1, clean=False, mus=(0.5,), nonfinite="skip"):
    chosen = ESTIMATORS[estimator]
    points = chosen.points(samples, first_order=clean)
    losses = torch.tensor(losses, dtype=torch.float64)
    assert len(points) == len(losses)
    has_clean = points[0].sign == 0
    differences = chosen.differences(points, losses)
    groups = [group(mu=mu) for mu in mus]
    return Estimate.of(losses, differences, groups, has_clean=has_clean, nonfinite=nonfinite)


def group(**options):
    defaults = dict(lr=0.1, maximize=False, weight_decay=0.0, seed=3, zo_step=5)
    return ZOGroup(Weights([Parameter(torch.ones(2), False)]), {**defaults, **options})


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=4), finite, st.booleans())
def test_two_sided(pairs, clean_loss, clean):
    losses = [clean_loss] * clean + [loss for pair in pairs for loss in pair]
    estimate, told = of(losses, samples=len(pairs), clean=clean, mus=(0.5, 2.0))
    for row, mu in zip(told.slopes.tolist(), (0.5, 2.0), strict=True):
        assert row == pytest.approx([(a - b) / 2 / mu for a, b in pairs], abs=1e-12)
    assert torch.equal(estimate.coefficients, told.slopes / len(pairs))
    mean = clean_loss if clean else sum(losses) / len(losses)
    assert float(told.loss) == pytest.approx(mean, abs=1e-12)
    assert told.finite


@given(finite, st.lists(finite, min_size=1, max_size=4))
def test_one_sided(clean, perturbed):
    _, told = of([clean, *perturbed], estimator="one_sided", samples=len(perturbed))
    assert told.slopes.tolist()[0] == pytest.approx([(x - clean) / 0.5 for x in perturbed])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_loss_drops_its_direction_and_a_bad_clean_one_all(bad):
    estimate, told = of([0.0, bad, 1.0, 3.0, 1.0], samples=2, clean=True)
    assert told.slopes.tolist() == [[0.0, 2.0]]
    assert (bool(told.finite), bool(estimate.usable), bool(estimate.clean)) == (False, True, True)
    estimate, told = of([bad, 1.0, 1.0, 3.0, 1.0], samples=2, clean=True)
    assert told.slopes.tolist() == [[0.0, 0.0]]
    assert (bool(estimate.usable), bool(estimate.clean)) == (False, False)
    with pytest.raises(FloatingPointError, match="must return finite losses"):
        of([0.0, bad, 1.0, 3.0, 1.0], samples=2, clean=True, nonfinite="raise")


def test_sums():
    one, _ = of([3.0, 1.0])
    two, _ = of([NAN, 1.0])
    alone = Estimate()
    total = one + two
    assert total.coefficients.tolist() == [[2.0]]
    assert total.usable
    assert total.clean is None
    assert (alone + one) is one
    assert (one + alone) is one
    with_clean, _ = of([NAN, 3.0, 1.0], clean=True)
    assert not (one + with_clean).clean
    assert not (with_clean + of([0.0, 3.0, 1.0], clean=True)[0]).clean
    other, _ = of([3.0, 1.0], mus=(1.0, 1.0))
    with pytest.raises(ValueError, match="same groups and samples"):
        one + other


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=3))
def test_the_order_of_sums_is_free(pairs):
    """Micro-batches add up as their slopes do, whichever comes first."""
    estimates = [of(list(pair))[0] for pair in pairs]
    total = sum(estimates, Estimate())
    wanted = sum((a - b) / 2 / 0.5 for a, b in pairs)
    assert total.coefficients.item() == pytest.approx(wanted, abs=1e-9)
    turned = sum(reversed(estimates), Estimate())
    assert turned.coefficients.item() == pytest.approx(wanted, abs=1e-9)


@given(st.lists(finite, min_size=2, max_size=2), st.booleans())
def test_saved_is_exact(losses, clean):
    estimate, _ = of([0.0] * clean + losses, clean=clean)
    again = Estimate.loaded(estimate.saved(), torch.device("cpu"))
    assert torch.equal(again.coefficients, estimate.coefficients)
    assert again.coefficients.dtype == torch.float64
    assert again.saved() == estimate.saved()
    assert Estimate.loaded(Estimate().saved(), torch.device("cpu")) == Estimate()


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor([0.1])])
def test_updates(lr):
    estimate, _ = of([3.0, 1.0], mus=(0.5, 0.25))
    groups = [group(lr=lr), group(lr=lr), group(lr=lr)]  # the last one was added since
    updates, states = estimate.updates(groups, SGD())
    assert [len(states), *states] == [2, {}, {}]
    assert [u.directions for u in updates] == [(Direction(3, 5, 0),)] * 2
    assert [u.coefficients.tolist() for u in updates] == [[2.0], [4.0]]
    assert all(u.lr.shape == () and float(u.lr) == pytest.approx(0.1) for u in updates)
    useless, _ = of([NAN, 1.0])
    assert float(useless.updates(groups, SGD())[0][0].lr) == 0.0
    assert Estimate().updates(groups, SGD()) == ([], [])


@given(st.lists(finite, min_size=2, max_size=8), st.booleans(), st.floats(0, 1))
def test_an_update_has_what_the_rule_makes(losses, maximize, decay):
    """Estimating and updating change nothing by themselves; states are kept by the caller."""
    losses = losses[: len(losses) // 2 * 2]
    estimate, _ = of(losses, samples=len(losses) // 2)
    before, rule = estimate.coefficients.clone(), Normalized()
    of_group = group(maximize=maximize, weight_decay=decay)
    (update,), (state,) = estimate.updates([of_group], rule)
    (row,), _ = shaped(rule, [group()], before)
    assert torch.equal(update.coefficients, -row if maximize else row)
    assert update.weight_decay == decay
    assert torch.equal(estimate.coefficients, before)
    remembered = of_group.options["zo_rule_state"]
    assert saved(remembered) == {"rule": repr(rule), "mean_square": 0.0, "weight": 0.0}
    keep([of_group], [state])
    assert saved(remembered)["weight"] == pytest.approx(0.01 if before.any() else 0.0)
    assert of_group.options["zo_step"] == 5


@pytest.mark.parametrize("ok", [True, False])
def test_first_order_waits_for_a_finite_clean_loss(ok):
    p = Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    estimate, _ = of([0.0 if ok else NAN, 3.0, 1.0], clean=True)
    assert estimate.first_order_is_healthy([p]) == ok
    assert Estimate().first_order_is_healthy([p])
