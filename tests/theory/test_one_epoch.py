"""The corrected proof: one epoch's inequality on quadratics, exactly; its algebra, in fractions."""

from fractions import Fraction

import numpy as np
import pytest

from experiments.convergence.epoch import PROVEN, Quadratics, problems

SOME = list(problems(400, np.random.default_rng(1)))


@pytest.mark.parametrize("signs", [False, True])
def test_an_epoch_does_what_step_4_says(signs):
    """At the largest rates, and at smaller ones."""
    random = np.random.default_rng(2)
    for quadratics, mu in SOME:
        for x, y in ((1.0, 1.0), random.random(2)):
            rates = PROVEN.limit_x * x, PROVEN.limit_y * y
            epoch = quadratics.epoch(*rates, 0.0 if signs else mu, signs)
            assert PROVEN.excess(epoch) <= 1e-9


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("limit_x", 128),
        ("limit_y", 4),
        ("left", 4),
        ("noise_x", 64),
        ("noise_y", 32),
        ("by_mu", 32),
    ],
)
def test_wrong_constants_are_noticed(name, factor):
    """That far off, each of them is violated; factors are powers of 2."""
    changed = PROVEN.harder(name, factor)
    epochs = (q.epoch(changed.limit_x, changed.limit_y, mu) for q, mu in SOME)
    assert sum(changed.excess(epoch) > 1e-9 for epoch in epochs) > 0


@pytest.mark.parametrize(("signs", "mu"), [(False, 0.5), (True, 0.0)])
def test_the_expectation_is_that_of_runs(signs, mu):
    """Within 4 standard errors, of steps as the algorithm takes them."""
    random, count, n, d = np.random.default_rng(3), 100_000, 2, 2
    A = random.standard_normal((n, 3, 3))
    q = Quadratics(A + A.transpose(0, 2, 1), random.standard_normal((n, 3)), d)
    lr_zo, lr_fo = 0.05, 0.1
    z, order = np.zeros((count, 3)), random.permuted(np.tile(np.arange(n), (count, 1)), axis=1)
    for i in order.T:
        gradients = np.einsum("rij,rj->ri", q.hessians[i], z) + q.gradients[i]
        v = random.standard_normal((count, d))
        v = np.sign(v) if signs else v
        slope = (gradients[:, :d] * v).sum(1)
        slope += mu / 2 * np.einsum("ri,rij,rj->r", v, q.hessians[i][:, :d, :d], v)
        z -= np.concatenate([lr_zo * slope[:, None] * v, lr_fo * gradients[:, d:]], axis=1)
    changes = np.einsum("ri,ij,rj->r", z, q.hessians.mean(0), z) / 2 + z @ q.gradients.mean(0)
    error = changes.std() / count**0.5
    assert abs(changes.mean() - q.change(lr_zo, lr_fo, mu, signs)) < 4 * error
    assert error < 0.05 * abs(changes.mean())


def coefficients(moment, a_x, a_y, n):
    """Step 4's, by steps 2 and 3, as L = M = 1 has them: left in x and y, added by noise in x and
    y, and by mu. `moment` is c."""
    S = Fraction(22, 10) / (1 - Fraction(48, 10) * 4 * moment * a_x**2 / n)  # S has V, V has S
    V_x, V_y = Fraction(16, 10) * a_x, Fraction(16, 10) * a_y
    most, by_V = max(a_x, a_y), 4 * moment * a_x / n
    return (
        Fraction(1, 2) - most * V_x / 2 - S * by_V * (1 + V_x * a_x),
        Fraction(1, 2) - most * V_y / 2 - S * by_V * a_x * V_y,
        Fraction(12, 10) / 4 + S * 4 * moment * (1 + Fraction(12, 10) * a_x**2 / n),
        Fraction(12, 10) / 4 + S * by_V * Fraction(12, 10) * a_x,
        2 * S,
    )


def test_the_algebra_of_step_4():
    """In exact fractions. All coefficients are best for small a_x, a_y and 1/n, and c a_x is 1/36
    for every d: so d = n = 1 is the worst of all, and there they are as printed."""
    worst = None
    for d in (1, 2, 3, 10, 1000, 10**9):
        for n in (1, 2, 3, 50, 10**6):
            a_x = Fraction(1, 72 * (d + 2))
            x, y, noise_x, noise_y, by_mu = coefficients(2 * (d + 2), a_x, Fraction(1, 2), n)
            found = (-x, -y, noise_x / (d + 2), noise_y, by_mu)
            worst = worst or found
            assert all(one <= most for one, most in zip(found, worst, strict=True))
    limits = (-Fraction(1, 4), -Fraction(1, 4), 18, Fraction(5, 16), Fraction(442, 100))
    assert all(one <= limit for one, limit in zip(worst, limits, strict=True))
    assert worst[0] > -Fraction(1, 2)


def test_the_algebra_notices_larger_rates():
    """At 1/36 in place of 1/72 less than a quarter is left in x."""
    x, *_ = coefficients(6, Fraction(1, 72 * 3), Fraction(1, 2), 1)
    assert x >= Fraction(1, 4)
    x, *_ = coefficients(6, Fraction(1, 36 * 3), Fraction(1, 2), 1)
    assert x < Fraction(1, 4)


def test_the_sums_of_step_2():
    """Of i^2, by which gradients drift; of i (n - i)/(n - 1), draws without replacement."""
    for n in range(1, 200):
        assert sum(i * i for i in range(n)) <= Fraction(n**3, 3)
        if n > 1:
            assert sum(Fraction(i * (n - i), n - 1) for i in range(n)) <= Fraction(n * n, 4)


@pytest.mark.parametrize(("m", "k", "times"), [(2, 2, 12), (4, 3, 7.5), (64, 64, 1.2)])
def test_kappa_of_low_rank(m, k, times):
    """As docs/theory.md has it, beside that of full directions."""
    d = m * k
    rank_1, full = m * (m + 2) * (m + 4) * k * (k + 2) * (k + 4), d * (d + 2) * (d + 4)
    assert rank_1 / full == pytest.approx(times, rel=2e-3)
    assert m * (m + 2) * k * (k + 2) / 4 <= d**2
