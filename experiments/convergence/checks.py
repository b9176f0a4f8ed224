"""The bound against runs: with the theorem's step sizes, and with what must fail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from zofo_optim.theory import StepSizes

from .optimizer import optimise
from .problems import Problem
from .simulation import LEMMA, Rates, Way, averages, needed, simulate

BASE = Problem(
    d_x=4,
    d_y=2,
    n=2,
    A=100.0,
    B=10.0,
    coupling=1.0,
    spread=10.0,
    noise=0.1,
    gap_zo=0.005,
    gap_fo=0.0005,
)
"""Where noise is small, so that the paper's step sizes do what they should."""
EXACT = BASE.but(noise=0.0, noise_fo=0.0, spread=0.0, n=1)
"""Without noise: what is left is that of the directions."""
NOISY = Problem(
    d_x=4,
    d_y=1,
    n=2,
    A=100.0,
    B=1.0,
    coupling=0.0,
    spread=0.0,
    noise=20.0,
    gap_zo=0.001,
    gap_fo=1e-5,
)
"""Where it is large: the paper's step sizes fail."""
NOISY_EPSILON = 0.2**0.5
MILD = Problem(
    d_x=4,
    d_y=1,
    n=2,
    A=100.0,
    B=100.0,
    coupling=0.0,
    spread=0.0,
    noise=2.0,
    gap_zo=0.01,
    gap_fo=1e-6,
)
"""Where d sigma^2 < 16 gap L_x n: they keep an epsilon^2 below sigma^2/(768 n), too."""
MILD_EPSILON = 0.002**0.5
FRACTIONS = (0.9, 0.5, 0.25)
"""epsilon as parts of the gradient's norm at the start."""
DELTA = 0.1
WAYS = {
    "one-sided, Gaussian": Way(),
    "two-sided, Gaussian": Way(two_sided=True),
    "one-sided, ±1": Way(rademacher=True),
    "two-sided, ±1": Way(two_sided=True, rademacher=True),
}
FIRST = next(iter(WAYS))
SCALES = (-1.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 300.0, 1000.0, 3000.0)
MOST = 10_000_000
"""Epochs of a run; where the bound has more there are no runs."""
MANY = 200_000
"""Of the averages that are kept of a run."""


def rates_of(sizes: StepSizes) -> Rates:
    return Rates(sizes.lr_zo, sizes.lr_fo, sizes.mu)


def finite(value: float) -> float | None:
    """None where a run diverged."""
    return value if math.isfinite(value) else None


def checked(
    problem: Problem, sizes: StepSizes, epsilon: float, seeds: Sequence[int], way: Way = LEMMA
) -> dict[str, Any]:
    """Runs of as many epochs as the bound has: how many of them keep what it promises."""
    every = max(1, sizes.epochs // MANY)
    squares, highest = simulate(problem, rates_of(sizes), sizes.epochs, seeds, way, every)
    found = [None if one is None else one * every for one in needed(squares, epsilon)]
    kept = [one for one in found if one is not None]
    return {
        "bound": sizes.epochs,
        "runs": len(found),
        "kept": len(kept),
        "needed": float(np.median(kept)) if kept else None,
        "average": finite(float(np.median(averages(squares)[:, -1])) / epsilon**2),
        "highest": finite(float(highest.max())),
        "level": sizes.level,
    }


def bound(seeds: int) -> list[dict[str, Any]]:
    """What is needed, and what the bound has, by problem, proof, epsilon and estimator."""
    rows = []
    for name, problem in (("noise", BASE), ("no noise", EXACT)):
        for proof in ("paper", "corrected"):
            for fraction in FRACTIONS:
                epsilon = fraction * problem.gradient_norm()
                sizes = problem.sizes(epsilon, DELTA, proof)
                about = {"problem": name, "proof": proof, "epsilon": fraction, "way": FIRST}
                if sizes.epochs > MOST:
                    rows.append({**about, "bound": sizes.epochs, "runs": 0, "level": sizes.level})
                    continue
                rows.append({**about, **checked(problem, sizes, epsilon, range(seeds))})
    for name, way in list(WAYS.items())[1:]:
        epsilon = 0.5 * BASE.gradient_norm()
        found = checked(BASE, BASE.sizes(epsilon, DELTA), epsilon, range(seeds), way)
        rows.append({"problem": "noise", "proof": "paper", "epsilon": 0.5, "way": name, **found})
    return rows


def real(seeds: int) -> list[dict[str, Any]]:
    """The library's optimizer: epochs until the average is at most epsilon^2, and those of the
    simulation, mean and sample deviation."""
    rows = []
    for fraction in (0.9, 0.5):
        epsilon = fraction * BASE.gradient_norm()
        sizes = BASE.sizes(epsilon, DELTA)
        for name, way in WAYS.items():
            ours = [
                len(optimise(BASE, rates_of(sizes), sizes.epochs, seed, way, enough=epsilon**2))
                for seed in range(seeds)
            ]
            squares, _ = simulate(BASE, rates_of(sizes), sizes.epochs, range(100), way)
            simulated = np.argmax(averages(squares) <= epsilon**2, axis=1) + 1
            rows.append(
                {
                    **{"epsilon": fraction, "way": name, "bound": sizes.epochs, "ours": ours},
                    **{"mean": float(simulated.mean()), "deviation": float(simulated.std(ddof=1))},
                }
            )
    return rows


def faults(seeds: int) -> list[dict[str, Any]]:
    """Runs whose estimate is multiplied by what it should not be, which is a wrong rate, too."""
    epsilon = 0.5 * BASE.gradient_norm()
    sizes = BASE.sizes(epsilon, DELTA)
    return [
        {"scale": scale, **checked(BASE, sizes, epsilon, range(seeds), Way(scale=scale))}
        for scale in SCALES
    ]
