"""How often runs fail, against delta."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from .checks import BASE, DELTA, EXACT, NOISY, NOISY_EPSILON, rates_of
from .problems import Problem
from .simulation import averages, simulate

CONFIDENCE = 0.99
LARGE = 0.9
"""A delta at which the corrected step sizes ask for no more than 70 million epochs."""


def frequency(
    problem: Problem, epsilon: float, delta: float, proof: str, seeds: int
) -> dict[str, Any]:
    """How many of the runs have an average above epsilon^2 after the bound's epochs.

    `least` and `most` limit the probability of it, at a confidence of 99 % (Clopper and Pearson).
    """
    sizes = problem.sizes(epsilon, delta, proof)
    every = max(1, sizes.epochs // 1000)
    squares, highest = simulate(problem, rates_of(sizes), sizes.epochs, range(seeds), every=every)
    ends = averages(squares)[:, -1] / epsilon**2
    failed = int((ends > 1).sum())
    limits = stats.binomtest(failed, seeds).proportion_ci(CONFIDENCE)
    return {
        **{"proof": proof, "delta": delta, "bound": sizes.epochs, "runs": seeds, "failed": failed},
        **{"least": float(limits.low), "most": float(limits.high)},
        **{"average": float(np.mean(ends)), "highest": float(highest.max()), "level": sizes.level},
    }


def failures(seeds: int, corrected_seeds: int) -> list[dict[str, Any]]:
    """Where noise is small, and where it is large."""
    rows = []
    for name, problem, proof in (
        ("noise", BASE, "paper"),
        ("no noise", EXACT, "paper"),
        ("no noise", EXACT, "corrected"),
    ):
        epsilon = 0.9 * problem.gradient_norm()
        rows.append({"problem": name, **frequency(problem, epsilon, DELTA, proof, seeds)})
    for delta, proof, count in (
        (DELTA, "paper", seeds),
        (LARGE, "paper", seeds),
        (LARGE, "corrected", corrected_seeds),
    ):
        if count:
            found = frequency(NOISY, NOISY_EPSILON, delta, proof, count)
            rows.append({"problem": "large noise", **found})
    return rows
