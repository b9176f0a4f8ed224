"""Lemma B.5 for every kind of estimate, by the library's optimizer. Seeds are fixed."""

import itertools

import pytest
import torch

pytest.importorskip("matplotlib", reason="the convergence study needs it")

from experiments.convergence import lemma

pytestmark = pytest.mark.filterwarnings("ignore:the loss was", "ignore:closure gave")
KINDS = pytest.mark.parametrize("kind", lemma.KINDS, ids=lambda kind: kind.name)
COUNT = 80


def test_fourth_moments_of_signs_are_those_of_all_directions():
    """Rank 2 of a 2 x 2 matrix of ±1 factors: all 256 of them."""
    kind = lemma.Kind(2, 2, "rademacher", 2)
    gradient = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    found = []
    for signs in itertools.product((-1.0, 1.0), repeat=8):
        left, right = torch.tensor(signs).view(2, 2, 2)
        v = left @ right.T / 2**0.5
        found.append((gradient * v).sum() ** 2 * v.square().sum())
    expected = kind.fourth_moment() * gradient.square().sum()
    assert torch.stack(found).mean() == pytest.approx(float(expected))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fourth_moments_of_gaussian_factors(rank):
    """Within 5 standard errors, on 400,000 directions."""
    kind = lemma.Kind(3, 2, "gaussian", rank)
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(400_000, 3, rank, generator=generator)
    right = torch.randn(400_000, 2, rank, generator=generator)
    v = left @ right.mT / rank**0.5
    gradient = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]])
    found = (gradient * v).sum((1, 2)) ** 2 * v.square().sum((1, 2))
    error = found.std() / 400_000**0.5
    expected = kind.fourth_moment() * gradient.square().sum()
    assert abs(found.mean() - expected) < 5 * error


@KINDS
@pytest.mark.parametrize("estimator", lemma.ESTIMATORS)
def test_bounds(kind, estimator):
    """Both bounds with 4 standard errors of room; the exact variance within 5 of them."""
    options = lemma.ESTIMATORS[estimator]
    for name in ("gradient", "curvature"):
        found = lemma.measured(kind, lemma.CASES[name], options, COUNT).summary()
        assert 0 < found["variance / bound"] + 4 * found["error"] < 1
        if name == "gradient":
            assert abs(found["variance / exact"] - 1) < 5 * found["exact error"] + 1e-3
        else:
            assert found["bias / bound"] + 4 * found["bias error"] < 1


@pytest.mark.parametrize("kind", [kind for kind in lemma.KINDS if kind.rank], ids=lambda k: k.name)
def test_directions_for_each_example(kind):
    for name in ("two-sided, per example", "antithetic, alike"):
        found = lemma.measured_per_example(kind, name, COUNT).summary()
        assert found["variance / bound"] < 1
        assert abs(found["variance / exact"] - 1) < 5 * found["exact error"] + 1e-3


def test_pairs_of_unlike_examples_are_outside_the_lemma():
    """The difference of their losses over 2 mu is no slope."""
    found = lemma.measured_per_example(lemma.Kind(rank=1), "antithetic, unlike", 20).summary()
    assert found["variance / bound"] > 100


def test_a_wrong_estimate_is_noticed():
    """One that is twice too large violates the exact variance."""
    kind = lemma.KINDS[3]
    found = lemma.measured(kind, lemma.CASES["gradient"], lemma.ESTIMATORS["one-sided"], COUNT)
    found.estimates *= 2
    summary = found.summary()
    assert abs(summary["variance / exact"] - 1) > 5 * summary["exact error"] + 1e-3
