"""The estimators against closed forms: bias, variance, order of the error, Example 2.3."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zofo_kernels import Direction, noise
from zofo_optim import HybridZOFO
from zofo_optim.estimators import ESTIMATORS, Point

names = st.sampled_from(["one_sided", "two_sided"])


def estimates(loss_of, start: Tensor, count: int = 1, **options) -> Tensor:
    """Estimates of the gradient at ``start``: steps with lr=1 in fp64, each back from there.

    Returns the movements, shape (count, *start.shape).
    """
    x = start.clone()
    groups = [{"params": [x], "mode": "zo", "mu": options.pop("mu", 1e-4)}]
    optimizer = HybridZOFO(groups, lr=1.0, **options)
    found = []
    for _ in range(count):
        optimizer.step(lambda: loss_of(x))
        found.append(start - x)
        x.copy_(start)
    return torch.stack(found)


def quadratic(dim: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    hessian = root @ root.T
    offset = torch.randn(dim, generator=generator, dtype=torch.float64)
    x = torch.randn(dim, generator=generator, dtype=torch.float64)
    return (lambda w: 0.5 * w @ hessian @ w + offset @ w), hessian @ x + offset, hessian, x


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
def test_mean_and_variance_on_a_quadratic(estimator, distribution):
    """E ghat = g; E|ghat - g|^2 = (d + 1)|g|^2 for Gaussian, (d - 1)|g|^2 for Rademacher.

    From E[v v' M v v'] with E v_i^4 = 3 or 1. One-sided adds O(mu) noise that is odd in v, so
    the mean stays; at mu = 1e-4 it is far below the tolerance. 3,000 steps: the mean of each
    component has standard error |g| sqrt((d + 1) / d / 3000) at most; 5 of them are allowed.
    """
    dim, draws = 10, 3000
    loss, gradient, _, x = quadratic(dim)
    options = {"estimator": estimator, "distribution": distribution}
    found = estimates(loss, x, draws, **options)
    norm = gradient.norm().item()
    error = (found.mean(0) - gradient).abs().max().item()
    assert error < 5 * norm * math.sqrt(2 / draws)
    factor = dim + 1 if distribution == "gaussian" else dim - 1
    spread = (found - gradient).square().sum(1)
    standard_error = spread.std().item() / math.sqrt(draws)
    assert abs(spread.mean().item() - factor * norm**2) < 5 * standard_error


def test_averaging_divides_the_variance():
    dim, draws = 8, 800
    loss, gradient, _, x = quadratic(dim, seed=1)
    spread = {}
    for samples in (1, 8):
        found = estimates(loss, x, draws, num_samples=samples)
        spread[samples] = (found - gradient).square().sum(1)
    ratio = spread[1].mean() / spread[8].mean()
    # relative standard errors of the two means, added
    tolerance = sum((v.std() / v.mean() / math.sqrt(draws)) for v in spread.values())
    assert abs(ratio / 8 - 1) < 5 * tolerance


def test_one_sided_noise_on_a_quadratic_is_the_curvature_term():
    """One-sided slope minus v.g is exactly mu/2 v'Hv; two-sided has none on a quadratic."""
    loss, gradient, hessian, x = quadratic(6, seed=2)
    mu = 0.1
    v = noise((6,), Direction(7, 0, 0), dtype=torch.float64)
    for estimator, extra in (("one_sided", mu / 2 * v @ hessian @ v), ("two_sided", 0.0)):
        (ghat,) = estimates(loss, x, seed=7, mu=mu, estimator=estimator)
        expected = (v @ gradient + extra) * v
        torch.testing.assert_close(ghat, expected, rtol=1e-9, atol=1e-9)


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.x = torch.randn(16, 4, dtype=torch.float64)
        self.y = torch.randint(0, 3, (16,))

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.body(self.x), self.y)


@pytest.mark.parametrize(("estimator", "order"), [("one_sided", 1), ("two_sided", 2)])
def test_order_of_the_error_on_a_network(estimator, order):
    """Halving mu divides the error of the slope along a fixed direction by 2^order."""
    net = SmallNet()
    names, params = zip(*net.body.named_parameters(), strict=True)
    gradients = torch.autograd.grad(net.loss(), params)
    v = [noise(p.shape, Direction(3, 0), index=i, dtype=p.dtype) for i, p in enumerate(params)]
    exact = sum((g * z).sum() for g, z in zip(gradients, v, strict=True))
    errors = []
    for mu in (4e-2, 2e-2, 1e-2):
        group = {"params": list(zip(names, params, strict=True)), "mode": "zo", "mu": mu}
        optimizer = HybridZOFO([group], lr=0.0, seed=3, estimator=estimator)
        optimizer.step(net.loss)
        errors.append(abs(optimizer.projected_grads.item() - exact.item()))
    for coarse, fine in pairwise(errors):
        assert 2**order * 0.8 < coarse / fine < 2**order * 1.25


def test_groups_with_their_own_mu_stay_unbiased():
    """f linear, so each step's movement averages to -lr g in every group, whatever its mu."""
    generator = torch.Generator().manual_seed(0)
    slopes = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2)]
    x = [torch.zeros(5, dtype=torch.float64) for _ in range(2)]
    optimizer = HybridZOFO(
        [{"params": [p], "mode": "zo", "mu": mu} for p, mu in zip(x, (1e-3, 1e-2), strict=True)],
        lr=1.0,
        num_samples=8,
    )
    steps = 500
    for _ in range(steps):
        optimizer.step(lambda: sum((a * p).sum() for a, p in zip(slopes, x, strict=True)))
    # variance of a component: (|g|^2 + g_i^2) / mu-ratio effects of the other group
    for position, (a, p) in enumerate(zip(slopes, x, strict=True)):
        other = slopes[1 - position].norm() * (10.0 if position == 0 else 0.1)
        sigma = math.sqrt((2 * a.norm() ** 2 + other**2).item() / (8 * steps))
        assert (-p / steps - a).abs().max() < 5 * sigma


def test_zo_only_is_mezo():
    """Against MeZO's update written out by hand with the same directions."""
    net = SmallNet()
    params = list(net.body.parameters())
    twin = SmallNet()
    mu, lr, decay = 1e-3, 1e-2, 0.1
    optimizer = HybridZOFO(params, mode="zo", lr=lr, mu=mu, weight_decay=decay, seed=5)
    for step in range(5):
        optimizer.step(net.loss)
        with torch.no_grad():
            own = list(twin.body.parameters())
            z = [noise(p.shape, Direction(5, step), index=i, dtype=p.dtype)
                 for i, p in enumerate(own)]  # fmt: skip
            start = [p.clone() for p in own]
            losses = []
            for sign in (1, -1):
                for p, w, v in zip(own, start, z, strict=True):
                    p.copy_(w + sign * mu * v)
                losses.append(twin.loss())
            g = (losses[0] - losses[1]) / (2 * mu)
            for p, w, v in zip(own, start, z, strict=True):
                p.copy_(w - lr * (g * v + decay * w))
    for p, w in zip(params, twin.body.parameters(), strict=True):
        torch.testing.assert_close(p, w, rtol=1e-9, atol=1e-10)


def example_2_3(lr_x: float, lr_y: float, steps: int, a: float = 50.0, b: float = 0.5):
    """f = a x^2 + b y^2 from (1, 1); one Rademacher dimension makes the estimate exact."""
    x = torch.ones(1, dtype=torch.float64)
    y = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = HybridZOFO(
        [{"params": [x], "mode": "zo", "lr": lr_x}, {"params": [y], "lr": lr_y}],
        distribution="rademacher",
    )
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step(lambda: (a * x**2 + b * y**2).sum())
    return x.item(), y.item()


def test_example_2_3():
    """Two rates converge in one step; one rate leaves y slow or makes x diverge."""
    a, b = 50.0, 0.5
    x, y = example_2_3(1 / (2 * a), 1 / (2 * b), steps=1)
    assert abs(x) < 1e-9
    assert abs(y) < 1e-12
    x, y = example_2_3(1 / (2 * a), 1 / (2 * a), steps=10)
    assert abs(x) < 1e-9
    assert y == pytest.approx((1 - b / a) ** 10)
    x, _ = example_2_3(1 / (2 * b), 1 / (2 * b), steps=3)
    assert abs(x) > 1e5


def test_hybrid_learns_what_the_adapter_cannot():
    """The base holds the answer's direction; only ZO can reach it."""
    torch.manual_seed(0)
    base = nn.Linear(6, 1, bias=False).requires_grad_(False)
    bias = nn.Parameter(torch.zeros(1))
    inputs = torch.randn(64, 6)
    targets = inputs @ torch.randn(6, 1)

    def loss() -> Tensor:
        return (base(inputs) + bias - targets).square().mean()

    start = loss().item()
    final = {}
    for kind in ("fo", "hybrid"):
        nn.init.zeros_(base.weight)
        nn.init.zeros_(bias)
        groups = [{"params": [bias], "lr": 0.1}]
        if kind == "hybrid":
            groups.append({"params": [base.weight], "mode": "zo", "lr": 0.02})
        optimizer = HybridZOFO(groups, num_samples=2)
        for _ in range(300):
            optimizer.zero_grad()
            optimizer.step(loss)
        final[kind] = loss().item()
    assert final["fo"] > 0.5 * start
    assert final["hybrid"] < 0.01 * start


def test_points_of_each_estimator():
    two, one = ESTIMATORS["two_sided"], ESTIMATORS["one_sided"]
    assert two.points(2, first_order=True) == [
        Point(0, 0, True),
        *(Point(s, sign) for s in (0, 1) for sign in (1, -1)),
    ]
    assert two.points(1, first_order=False) == [Point(0, 1), Point(0, -1)]
    assert one.points(2, first_order=True) == [Point(0, 0, True), Point(0, 1), Point(1, 1)]
    assert one.points(1, first_order=False) == [Point(0, 0), Point(0, 1)]


@given(names, st.integers(0, 5), st.booleans())
def test_points(name, samples, first_order):
    """One gradient, at the first point, where there is anything first-order; no point twice."""
    points = ESTIMATORS[name].points(samples, first_order=first_order)
    assert [point.gradient for point in points] == [first_order] + [False] * (len(points) - 1)
    assert len(set(points)) == len(points) >= 1
    assert all(point.sign for point in points[1:])
    assert {point.sample for point in points if point.sign} == set(range(samples))


@given(names, st.integers(1, 5), st.booleans(), st.randoms(use_true_random=False))
def test_differences(name, samples, first_order, random):
    """Of f(x + t v_s) = c + a_s t + b_s t^2 per unit of t: a_s two-sided, a_s + b_s one-sided."""
    a, b = ([random.uniform(-5, 5) for _ in range(samples)] for _ in range(2))
    points = ESTIMATORS[name].points(samples, first_order=first_order)
    losses = [2.0 + a[p.sample] * p.sign + b[p.sample] * p.sign**2 for p in points]
    found = ESTIMATORS[name].differences(points, torch.tensor(losses, dtype=torch.float64))
    error = [0.0] * samples if name == "two_sided" else b
    assert found.tolist() == pytest.approx([x + y for x, y in zip(a, error, strict=True)])
