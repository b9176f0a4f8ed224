"""Random orders against draws with replacement, and two rates against one."""

from __future__ import annotations

from typing import Any

import numpy as np

from .problems import Problem
from .simulation import Rates, Way, simulate

SHARED = Problem(
    d_x=4,
    d_y=4,
    n=16,
    A=10.0,
    B=10.0,
    coupling=0.0,
    noise=0.0,
    gap_zo=1e-6,
    gap_fo=1e-6,
)
ILL = Problem(
    d_x=8,
    d_y=8,
    n=1,
    A=100.0,
    B=1.0,
    coupling=0.0,
    noise=0.0,
    gap_zo=1e-4,
    gap_fo=1e-2,
)
"""Example 2.3: curvatures 100 and 1, and as large a gradient in x as in y."""
GRID = [10.0 ** (-k / 8) for k in range(40)]
"""Rates, from 1 down."""
PART = 0.01
"""What is to be left of the gradient's norm."""


def sampling(seeds: int) -> list[dict[str, Any]]:
    """The average squared gradient that is left at constant rates, where the start is at f*."""
    rows = []
    for where, noises in (("y", dict(noise_fo=1.0)), ("x", dict(noise=1.0))):
        problem = SHARED.but(**noises)
        for part in (0.2, 0.1, 0.05):
            rate = part / (problem.B * problem.n)
            rates = Rates(rate / (problem.d_x + 2), rate, 1e-6)
            epochs = int(200 / part)
            row: dict[str, Any] = {"noise": where, "part": part}
            for name, way in (("orders", Way()), ("draws", Way(replacement=True))):
                squares, _ = simulate(problem, rates, epochs, range(seeds), way)
                row[name] = float(squares[:, epochs // 2 :].mean())
            rows.append({**row, "ratio": row["draws"] / row["orders"]})
    return rows


def epochs_to(problem: Problem, rates: Rates, most: int, seeds: int) -> float:
    """The median epoch at which 1 % of the gradient's norm is left; infinite: not by `most`."""
    squares, _ = simulate(problem, rates, most, range(seeds))
    least = (PART * problem.gradient_norm()) ** 2
    reached = squares <= least
    first = np.where(reached.any(1), reached.argmax(1), np.inf)
    return float(np.median(first))


def two_rates(seeds: int, most: int = 20_000) -> dict[str, Any]:
    """The best single rate of the grid, and the best pair."""
    single = {rate: epochs_to(ILL, Rates(rate, rate, 1e-6), most, seeds) for rate in GRID}
    best = min(single, key=single.__getitem__)
    pairs = {
        (zo, fo): epochs_to(ILL, Rates(zo, fo, 1e-6), most // 20, seeds)
        for zo in GRID[16:32]
        for fo in GRID[:8:2]
    }
    zo, fo = min(pairs, key=pairs.__getitem__)
    return {
        "single": {"lr": best, "epochs": single[best]},
        "pair": {"lr_zo": zo, "lr_fo": fo, "epochs": pairs[zo, fo]},
        "curve": {f"{rate:.4g}": value for rate, value in single.items() if np.isfinite(value)},
    }
