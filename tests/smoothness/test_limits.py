"""Limits of rates: against the steps themselves on quadratics, where they are exact."""

import math

import pytest
import torch

from zofo_optim.smoothness.lanczos import spectrum_ends
from zofo_optim.smoothness.limits import first_order_limit, zeroth_order_limit

SGD = dict(momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0, maximize=False)


def grows(options, rate, curvature, coupling=0.0):
    """Whether 400 steps of torch's SGD on h x^2 / 2 end above where they began."""
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=rate, **options)
    for _ in range(400):
        x.grad = (1 + coupling) * curvature * x.detach()
        optimizer.step()
    return x.abs().item() > 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(momentum=0.9),
        dict(momentum=0.5, dampening=0.3),
        dict(momentum=0.9, nesterov=True),
        dict(weight_decay=0.7, momentum=0.3),
        dict(dampening=0.5),
    ],
)
def test_sgd_is_stable_up_to_its_limit(options):
    chosen = {**SGD, **options}
    for coupling in (0.0, 0.25):
        limit = first_order_limit(chosen, 3.0, coupling=coupling)
        assert not grows(chosen, 0.98 * limit, 3.0, coupling)
        assert grows(chosen, 1.02 * limit, 3.0, coupling)


def test_no_limit_where_nothing_curves_upwards():
    assert first_order_limit(SGD, -1.0) is None
    assert first_order_limit(SGD, 0.0) is None
    assert first_order_limit({**SGD, "weight_decay": 0.5}, -0.1) == pytest.approx(2 / 0.4)
    assert first_order_limit({**SGD, "maximize": True}, 3.0) is None


def quadratic(eigenvalues, count, seed=0):
    """Slopes and curvatures of x' diag x / 2 at ones, along Gaussian directions."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(count, len(eigenvalues), generator=generator, dtype=torch.float64)
    return v @ eigenvalues, v.square() @ eigenvalues


@pytest.mark.parametrize("samples", [1, 4])
def test_zeroth_order_limit_of_a_quadratic(samples):
    """H = h I: E[g' H g] = h ||grad||^2 (1 + (d + 1) / N), so the limit is 2 / that, over h."""
    d, h = 50, 0.3
    slopes, curvatures = quadratic(torch.full((d,), h, dtype=torch.float64), 40_000)
    limit = zeroth_order_limit(slopes, curvatures, h, together=1, samples=samples)
    assert limit == pytest.approx(2 / (h * (1 + (d + 1) / samples)), rel=0.02)


def test_mean_square_of_steps_grows_above_the_limit_alone():
    """For H = h I the limit is that of E||x||^2: 4,000 runs of 20 steps, beside it by 30 %."""
    d, h = 10, 0.7
    limit = 2 / (h * (d + 2))
    generator = torch.Generator().manual_seed(0)
    for factor, sign in ((0.7, -1), (1.3, 1)):
        x = torch.ones(4000, d, dtype=torch.float64)
        for _ in range(20):
            v = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = x - factor * limit * h * (v * x).sum(1, keepdim=True) * v
        assert sign * math.log(x.square().sum(1).mean().item() / d) > 0.5


def test_losses_of_examples():
    """Directions of their own: N is the number of directions in a step, slopes are the examples'.

    B examples with gradients g_b = H x_b, all of one Hessian h I.
    """
    d, h, examples = 40, 0.5, 6
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(examples, d, generator=generator, dtype=torch.float64)
    v = torch.randn(40_000, d, generator=generator, dtype=torch.float64)
    slopes = v @ gradients.T
    curvatures = h * v.square().sum(1, keepdim=True).expand(-1, examples)
    for together in (1, 2):
        means = gradients.view(-1, together, d).mean(1)
        each, whole = means.square().sum(1).mean(), gradients.mean(0).square().sum()
        count = examples // together
        along = each * h * (d + 2) / count + (1 - 1 / count) * h * whole
        limit = zeroth_order_limit(slopes, curvatures, h, together=together, samples=1)
        assert limit == pytest.approx((2 * whole / along).item(), rel=0.03)


def test_unknown_zeroth_order_limits():
    slopes, curvatures = quadratic(torch.ones(5, dtype=torch.float64), 10)
    assert zeroth_order_limit(slopes, -curvatures, None, together=1, samples=1) is None
    assert zeroth_order_limit(0 * slopes, curvatures, None, together=1, samples=1) is None
    assert zeroth_order_limit(slopes, curvatures, None, together=1, samples=2) is None
    nan = slopes * math.nan
    assert zeroth_order_limit(nan, curvatures, None, together=1, samples=1) is None


def test_noise_is_no_limit():
    """Curvatures that rounding makes, and those of both signs whose mean is not known."""
    slopes, curvatures = quadratic(torch.full((50,), 0.3, dtype=torch.float64), 8)

    def limit(curvatures, rounding=0.0, samples=1):
        return zeroth_order_limit(
            slopes, curvatures, 0.3, together=1, samples=samples, rounding=rounding
        )

    assert limit(curvatures) == limit(curvatures, 1.0) == pytest.approx(2 / 15, rel=0.3)
    assert limit(curvatures, 10.0) is None
    assert limit(curvatures, 10.0, samples=1000) == pytest.approx(2 / 0.3, rel=0.1)
    generator = torch.Generator().manual_seed(0)
    known = [
        limit(torch.randn(8, generator=generator, dtype=torch.float64)) is not None
        for _ in range(200)
    ]
    assert sum(known) < 80  # half of them are above 0


def test_signs_and_many_samples():
    """H = I: E[u' H u] = ||g||^2 (d / N + 1 - 1 / N) for directions of signs."""
    d = 10
    generator = torch.Generator().manual_seed(0)
    v = torch.randint(0, 2, (8, d), generator=generator).double() * 2 - 1
    curvatures = torch.full((8,), float(d), dtype=torch.float64)
    for samples in (1, 5, 200):
        limit = zeroth_order_limit(v.sum(1), curvatures, 1.0, together=1, samples=samples)
        assert limit == pytest.approx(2 / (d / samples + 1 - 1 / samples))


# ---- Lanczos -----------------------------------------------------------------------------------


def operator(values, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    d = len(values)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    matrix = (q * torch.as_tensor(values, dtype=torch.float64)) @ q.T
    start = torch.randn(d, generator=generator, dtype=torch.float64)
    return matrix.to(dtype), start.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_products_give_the_ends(dtype):
    matrix, start = operator([-3.0, -1, 0, 0.5, 1, 2.5], dtype)
    ends = spectrum_ends(matrix.mv, start, 6)
    assert ends.largest == pytest.approx(2.5, rel=1e-5)
    assert ends.smallest == pytest.approx(-3.0, rel=1e-5)
    assert ends.extreme == ends.smallest


def test_few_products_come_from_within_and_go_on_where_they_ended():
    values = [*torch.linspace(-1, 1, 200).tolist(), 4.0, -2.0]
    matrix, start = operator(values)
    found, count = [], 0

    def product(v):
        nonlocal count
        count += 1
        assert v.norm().item() == pytest.approx(1.0)
        return matrix.mv(v)

    for _ in range(3):
        ends = spectrum_ends(product, start, 4)
        assert ends.largest <= 4.0 + 1e-12
        assert ends.smallest >= -2.0 - 1e-12
        assert 4.0 - ends.largest <= ends.largest_error + 1e-12
        found.append(ends)
        start = ends.vector
    assert count == 18  # 4 and 2 each
    assert found[2].largest > found[0].largest
    assert found[2].largest == pytest.approx(4.0, rel=1e-3)
    assert found[2].smallest == pytest.approx(-2.0, rel=2e-2)


def test_rounding_does_not_inflate_the_ends():
    """Products that are mostly noise, as differences over too short a step are."""
    matrix, start = operator(torch.linspace(-0.1, 1, 400).tolist())
    generator = torch.Generator().manual_seed(2)

    def noisy(v):
        noise = torch.randn(v.shape, generator=generator, dtype=v.dtype)
        return matrix.mv(v) + 10 * noise / noise.norm()

    ends = spectrum_ends(noisy, start, 8)
    assert -2 < ends.smallest <= ends.largest < 2  # noise of 10 along one of 400 dimensions


def test_a_space_that_is_spent_ends_early():
    calls = []
    ends = spectrum_ends(lambda v: calls.append(0) or 3 * v, torch.ones(9), 8)
    assert (ends.largest, len(calls)) == (pytest.approx(3.0), 2)
    assert spectrum_ends(lambda v: 0 * v, torch.ones(3), 3).extreme == 0.0
