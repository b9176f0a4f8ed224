"""How often runs fail, against delta."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from .checks import BASE, DELTA, EXACT, MILD, MILD_EPSILON, NOISY, NOISY_EPSILON, rates_of
from .problems import Problem
from .simulation import averages, simulate

CONFIDENCE = 0.99
LARGE = 0.9
"""A delta at which the corrected step sizes ask for no more than 70 million epochs."""


def frequency(
    problem: Problem, epsilon: float, delta: float, proof: str, seeds: int, part_of_mu: float = 1.0
) -> dict[str, Any]:
    """How many of the runs have an average above epsilon^2 after the bound's epochs.

    `least` and `most` limit the probability of it, at a confidence of 99 % (Clopper and Pearson).
    `part_of_mu` multiplies the theorem's mu.
    """
    sizes = problem.sizes(epsilon, delta, proof)
    every = max(1, sizes.epochs // 1000)
    rates = replace(rates_of(sizes), mu=sizes.mu * part_of_mu)
    squares, highest = simulate(problem, rates, sizes.epochs, range(seeds), every=every)
    ends = averages(squares)[:, -1] / epsilon**2
    failed = int((ends > 1).sum())
    limits = stats.binomtest(failed, seeds).proportion_ci(CONFIDENCE)
    return {
        **{"proof": proof, "delta": delta, "bound": sizes.epochs, "runs": seeds, "failed": failed},
        **{"least": float(limits.low), "most": float(limits.high)},
        **{"average": float(np.mean(ends)), "highest": float(highest.max()), "level": sizes.level},
    }


def failures(seeds: int, long_seeds: int) -> list[dict[str, Any]]:
    """Where noise is small, and where it is large; ``long_seeds`` runs of millions of epochs."""
    rows = []
    for name, problem, proof in (
        ("noise", BASE, "paper"),
        ("no noise", EXACT, "paper"),
        ("no noise", EXACT, "corrected"),
    ):
        epsilon = 0.9 * problem.gradient_norm()
        rows.append({"problem": name, **frequency(problem, epsilon, DELTA, proof, seeds)})
    large, mild = (NOISY, NOISY_EPSILON), (MILD, MILD_EPSILON)
    for name, (problem, epsilon), delta, proof, count, part_of_mu in (
        ("large noise", large, DELTA, "paper", seeds, 1.0),
        ("large noise, mu / 100", large, DELTA, "paper", seeds, 0.01),
        ("large noise", large, LARGE, "paper", seeds, 1.0),
        ("large noise", large, LARGE, "corrected", long_seeds, 1.0),
        ("mild noise", mild, LARGE, "paper", long_seeds, 1.0),
    ):
        if count:
            found = frequency(problem, epsilon, delta, proof, count, part_of_mu)
            rows.append({"problem": name, **found})
    return rows
