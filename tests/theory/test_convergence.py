"""Runs against the theorem: what must hold, what must fail, and the command. Seeds are fixed."""

import json
import math

import numpy as np
import pytest
import torch

NEEDED = "the convergence study needs it"
for package in ("numba", "scipy", "transformers", "rich", "matplotlib"):
    pytest.importorskip(package, reason=NEEDED)

from experiments.convergence import __main__ as command  # noqa: E402
from experiments.convergence import exponents, failures, sampling  # noqa: E402
from experiments.convergence.checks import (  # noqa: E402
    BASE,
    DELTA,
    NOISY,
    NOISY_EPSILON,
    checked,
    rates_of,
)
from experiments.convergence.optimizer import Components, optimise  # noqa: E402
from experiments.convergence.problems import Problem  # noqa: E402
from experiments.convergence.simulation import (  # noqa: E402
    Rates,
    Way,
    averages,
    needed,
    simulate,
)

SMALL = BASE.but(d_x=1, d_y=1, n=1, noise=0.0, spread=0.0)
"""Few epochs, for the library's optimizer."""
UNEVEN = Problem(d_x=3, d_y=2, n=4, A=2, B=0.5, coupling=0.3, spread=0.2, noise=1, noise_fo=0.5)
EPSILON = 0.9 * BASE.gradient_norm()


def hessian(components, i, at):
    def loss(joined):
        components.x, components.y = joined[:3], joined[3:]
        return components.loss(i)

    return torch.func.hessian(loss)(at)


def points(problem, level, count):
    """Random points of the sub-level set, and up to ``reach`` around it."""
    random = np.random.default_rng(0)
    while count:
        x, y = random.standard_normal((2, 3)), random.standard_normal((2, 2))
        x, y = x[0] * random.random() * 2, y[0] * random.random() * 3
        if problem.value(x, y) > level:
            continue
        near = [part + problem.reach * random.uniform(-1, 1, len(part)) for part in (x, y)]
        yield x, y, torch.from_numpy(np.concatenate(near))
        count -= 1


def test_the_constants_hold_on_the_level_set():
    level = 1.5
    constants, components = UNEVEN.constants(level), Components(UNEVEN)
    scale = torch.tensor([constants.L_x] * 3 + [constants.L_y] * 2).double().sqrt()
    single = torch.tensor([constants.L_x_max] * 3 + [constants.L_y_max] * 2).double().sqrt()
    for x, y, near in points(UNEVEN, level, 12):
        hessians = torch.stack([hessian(components, i, near) for i in range(4)])
        largest = torch.linalg.matrix_norm(hessians / single[:, None] / single, ord=2)
        assert largest.max() <= 1
        mean = hessians.mean(0) / scale[:, None] / scale
        assert torch.linalg.matrix_norm(mean, ord=2) <= 1
        components.x, components.y = torch.from_numpy(x), torch.from_numpy(y)
        assert components.squared_gradient() <= constants.G**2
        at = torch.from_numpy(np.concatenate([x, y])).requires_grad_()
        components.x, components.y = at[:3], at[3:]
        gradients = [torch.autograd.grad(components.loss(i), at)[0] for i in range(4)]
        variance = torch.stack(gradients).var(0, correction=0).sum()
        assert variance <= constants.sigma**2
        with torch.no_grad():
            components.x, components.y = at[:3].detach(), at[3:].detach()
            value = sum(float(components.loss(i)) for i in range(4)) / 4
            assert value == pytest.approx(UNEVEN.value(x, y), abs=1e-12)
            squared = float(torch.stack(gradients).mean(0).square().sum())
            assert components.squared_gradient() == pytest.approx(squared)


def test_it_is_not_smooth_but_hybrid_generalised_smooth():
    """Curvature grows without bound, and no faster than A + |gradient|."""
    x = np.linspace(-30, 30, 1001)
    curvature, gradient = UNEVEN.A * np.cosh(x), UNEVEN.A * np.abs(np.sinh(x))
    assert curvature.max() > 1e12
    assert (curvature <= UNEVEN.A + gradient * (1 + 1e-12)).all()


def test_the_simulation_and_the_optimizer_make_the_same_step():
    """Mean and deviation of the first epoch's effect, over seeds, within 5 standard errors."""
    rates, way = Rates(0.02, 0.05, 1e-4), Way()
    squares, _ = simulate(UNEVEN, rates, 2, range(4000), way)
    ours = np.array([optimise(UNEVEN, rates, 2, seed, way)[1] for seed in range(60)])
    theirs = squares[:, 1]
    error = math.hypot(ours.std() / math.sqrt(60), theirs.std() / math.sqrt(4000))
    assert abs(ours.mean() - theirs.mean()) < 5 * error
    assert ours.std() == pytest.approx(theirs.std(), rel=0.4)


def test_the_bound_holds_in_the_simulation():
    for proof, problem in (("paper", BASE), ("corrected", SMALL)):
        epsilon = 0.9 * problem.gradient_norm()
        sizes = problem.sizes(epsilon, DELTA, proof)
        found = checked(problem, sizes, epsilon, range(20))
        assert found["kept"] == 20
        assert 10 < found["needed"] < sizes.epochs / 5
        assert found["highest"] <= sizes.level


@pytest.mark.parametrize("scale", [-1.0, 0.01, 0.1, 3000.0])
def test_a_wrong_sign_scale_or_rate_fails(scale):
    """0.9 of the gradient is nearly there at the start; 0.5 of it is not."""
    epsilon = 0.5 * BASE.gradient_norm()
    sizes = BASE.sizes(epsilon, DELTA)
    assert checked(BASE, sizes, epsilon, range(10), Way(scale=scale))["kept"] == 0


@pytest.mark.parametrize("way", [Way(), Way(two_sided=True, rademacher=True)])
def test_the_bound_holds_in_the_optimizer(way):
    epsilon = 0.9 * SMALL.gradient_norm()
    sizes = SMALL.sizes(epsilon, 0.5)
    run = optimise(SMALL, rates_of(sizes), sizes.epochs, 0, way, enough=epsilon**2)
    assert averages(run)[-1] <= epsilon**2
    assert 20 < len(run) < sizes.epochs / 5


@pytest.mark.parametrize("scale", [-1.0, 3000.0])
def test_in_the_optimizer_too_a_wrong_sign_or_rate_fails(scale):
    epsilon = 0.9 * SMALL.gradient_norm()
    sizes = SMALL.sizes(epsilon, 0.5)
    faulty = Way(scale=scale)
    run = optimise(SMALL, rates_of(sizes), sizes.epochs, 0, faulty, enough=epsilon**2)
    total = run.sum()
    assert not total <= epsilon**2 * sizes.epochs
    assert len(run) < sizes.epochs


def test_failures_are_rarer_than_delta():
    """By the upper limit of their probability, at 99 %."""
    found = failures.frequency(BASE, EPSILON, DELTA, "paper", 100)
    assert found["most"] < DELTA
    assert found["highest"] <= found["level"]


def test_with_large_noise_the_paper_s_step_sizes_fail():
    """Its bound on the variance of an estimate leaves out what components do not share."""
    found = failures.frequency(NOISY, NOISY_EPSILON, DELTA, "paper", 100)
    assert found["least"] > 5 * DELTA


@pytest.mark.parametrize(
    ("name", "slope"),
    [
        ("epsilon, rates bound by curvature", -2),
        ("d_x, rates bound by curvature", 1),
        ("epsilon, corrected, rates bound by noise", -4),
    ],
)
def test_exponents(name, slope, monkeypatch):
    what, problem, proof, values = exponents.CASES[name]
    monkeypatch.setattr(exponents, "CASES", {name: (what, problem, proof, values[:2])})
    (found,) = exponents.exponents(1)
    assert found["fit of bound"][0] == pytest.approx(slope, abs=0.15)
    assert found["fit"][0] == pytest.approx(slope, abs=0.35)
    assert all(n < bound for n, bound in zip(found["needed"], found["bounds"], strict=True))


def test_fit():
    slope, error = exponents.fit([1, 2, 4], [3, 12, 48])
    assert slope == pytest.approx(2)
    assert error == pytest.approx(0, abs=1e-6)


def test_random_orders_help_first_order():
    rows = sampling.sampling(5)
    assert all(row["ratio"] > 50 for row in rows if row["noise"] == "y")
    assert all(1 < row["ratio"] < 2 for row in rows if row["noise"] == "x")


def test_needed():
    squares = np.array([[4.0, 0.0, 0.0, 0.0], [0.0, 9.0, 9.0, 9.0], [0.5, 0.5, 0.5, 0.5]])
    assert needed(squares, 1.0) == [4, None, 1]


def test_blocks_of_epochs_have_the_mean_of_their_epochs():
    rates = Rates(0.02, 0.05, 1e-4)
    one, _ = simulate(UNEVEN, rates, 12, [3])
    blocks, _ = simulate(UNEVEN, rates, 12, [3], every=4)
    assert blocks[0] == pytest.approx(one[0].reshape(3, 4).mean(1))


def test_components_of_unlike_curvature_come_in_pairs():
    with pytest.raises(ValueError, match="n must be even"):
        UNEVEN.but(n=3).signs()


def test_command(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert command.main(["faults", "rates", "report", "--seeds", "1", *out]) == 0
    for name in ("faults", "rates"):
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert content["settings"]["seeds"] == 1
    table = (tmp_path / "table.md").read_text()
    assert "| -1 | 0 of 1 | diverges |" in table
    assert "| best pair |" in table
    assert (tmp_path / "faults.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        command.main(["report", "--out", str(tmp_path / "nowhere")])
    assert "--out must be a folder with results" in capsys.readouterr().err
