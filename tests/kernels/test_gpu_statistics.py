"""Statistics of 10^8 elements on a GPU: within five standard errors of a true sample."""

import math

import pytest
import torch
from arranged import PIECE
from on_gpu import ON_GPU, memory_for
from scipy import stats

from zofo_kernels import Direction, noise

pytestmark = pytest.mark.gpu


N = 10**8
SE = 1 / math.sqrt(N)
WORDS = {"seed": 2024, "step": 7, "sample": 1}


def draw(index=0, **fields):
    return noise((N,), Direction(**(WORDS | fields)), index=index, **ON_GPU).double()


@pytest.fixture(scope="module")
def draws():
    memory_for(8 * 2**30)
    return draw()


@pytest.fixture(scope="module")
def signs():
    memory_for(8 * 2**30)
    return draw(distribution="rademacher")


def dependence(x, y):
    """The correlations of x with y and of x^2 with y^2, in standard errors."""
    n = math.sqrt(x.numel())
    of_squares = torch.dot(x * x - 1, y * y - 1) / 2
    return max(abs(torch.dot(x, y).item()), abs(of_squares.item())) / n


def test_moments(draws):
    assert abs(draws.mean().item()) < 5 * SE
    assert abs(draws.square().mean().item() - 1) < 5 * math.sqrt(2) * SE
    assert abs(draws.pow(3).mean().item()) < 5 * math.sqrt(15) * SE
    assert abs(draws.pow(4).mean().item() - 3) < 5 * math.sqrt(96) * SE  # the kurtosis
    assert abs(draws.pow(6).mean().item() - 15) < 5 * math.sqrt(10395 - 225) * SE


def test_tails_and_extremes(draws):
    size = draws.abs()
    assert 5.2 < size.max().item() < 5.8
    for bound in (0.1, 0.5, 1, 2, 3, 4, 4.5):
        p = 2 * stats.norm.sf(bound)
        part = (size > bound).double().mean().item()
        assert abs(part - p) < 5 * math.sqrt(p * (1 - p)) * SE + 4e-7, bound
        upper = (draws > bound).double().mean().item()
        assert abs(upper - p / 2) < 5 * math.sqrt(p / 2) * SE + 2e-7, bound
    assert abs((draws > 0).double().mean().item() - 0.5) < 5 * 0.5 * SE


def test_kolmogorov_smirnov(draws):
    """512 angles leave a dip of the density at |z| < 0.01: at most 7e-4 of the function."""
    some = draws[::100].cpu().numpy()
    p = stats.kstest(some, stats.norm.cdf)
    critical = math.sqrt(math.log(2 / 5.7e-7) / 2)  # of probability 5.7e-7: 5 sigma
    assert p.statistic < critical / math.sqrt(len(some)) + 7e-4


def test_neighbours_are_independent(draws):
    for lag in [*range(1, 17), 32, 128, PIECE]:
        assert dependence(draws[:-lag], draws[lag:]) < 5, lag
    blocks = draws[: N // 8 * 8].view(-1, 8)  # normals of one call
    for values in (blocks, (blocks.square() - 1) / math.sqrt(2)):
        together = values.T @ values / math.sqrt(len(values))
        together.fill_diagonal_(0)
        assert together.abs().max().item() < 5


@pytest.mark.parametrize(
    "other",
    [{"index": 1}, {"index": 256}, {"step": 8}, {"sample": 2}, {"seed": 2025}],
    ids=str,
)
def test_parameters_steps_and_seeds_are_independent(draws, signs, other):
    y = draw(**other)
    for lag in (0, 1, 8):
        assert dependence(draws[lag:], y[: N - lag]) < 5
    del y
    y = draw(**other, distribution="rademacher")
    for lag in (0, 1, 32, 128):
        assert abs(torch.dot(signs[lag:], y[: N - lag]).item()) * SE < 5


def test_signs_are_balanced_and_independent(signs):
    assert bool((signs.abs() == 1).all())
    assert abs(signs.mean().item()) < 5 * SE
    by_bit = signs[: N // 128 * 128].view(-1, 128)
    n = math.sqrt(len(by_bit))
    assert by_bit.mean(dim=0).abs().max().item() < 5 / n
    together = by_bit.T @ by_bit / n
    together.fill_diagonal_(0)
    assert together.abs().max().item() < 5.5  # the largest of 8128 pairs
    for lag in [*range(1, 17), 32, 128, PIECE]:
        assert abs(torch.dot(signs[:-lag], signs[lag:]).item()) * SE < 5, lag
