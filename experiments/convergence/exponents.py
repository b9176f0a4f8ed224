"""How the epochs that are needed grow with 1/epsilon and with d_x, beside the bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from .checks import DELTA, MANY, rates_of
from .problems import Problem
from .simulation import needed, simulate

CURVED = Problem(
    d_x=4,
    d_y=1,
    n=1,
    A=100.0,
    B=10.0,
    coupling=0.0,
    noise=0.0,
    gap_zo=0.005,
    gap_fo=1e-5,
)
"""Rates are bound by curvature."""
NOISE = CURVED.but(n=2, noise=0.1, d_x=1)
"""Those of the corrected proof, by noise."""
LIMITED = CURVED.but(d_x=1)
"""The paper's, by sqrt(1/T): there it must be many epochs."""
CASES: dict[str, tuple[str, Problem, str, Sequence[float]]] = {
    "epsilon, rates bound by curvature": ("epsilon", CURVED, "paper", (0.6, 0.4, 0.27, 0.18, 0.12)),
    "epsilon, rates bound by sqrt(1/T)": ("epsilon", LIMITED, "paper", (0.09, 0.07, 0.055, 0.043)),
    "epsilon, corrected, rates bound by curvature": (
        *("epsilon", CURVED, "corrected"),
        (0.6, 0.4, 0.27, 0.18, 0.12),
    ),
    "epsilon, corrected, rates bound by noise": (
        *("epsilon", NOISE, "corrected"),
        (0.5, 0.4, 0.32, 0.25),
    ),
    "d_x, rates bound by curvature": ("d_x", CURVED, "paper", (2, 4, 8, 16, 32, 64)),
    "d_x, corrected, rates bound by curvature": (
        *("d_x", CURVED, "corrected"),
        (2, 4, 8, 16, 32, 64),
    ),
}
AT = 0.5
"""epsilon, as a part of the gradient at the start, where d_x varies."""


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of a line through the logarithms, and its standard error."""
    line = stats.linregress(np.log(x), np.log(y))
    return float(line.slope), float(line.stderr)


def exponents(seeds: int, track: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """For each case: what varies, bounds, epochs needed (the median of seeds), fitted exponents."""
    rows = []
    for name, (what, problem, proof, values) in CASES.items():
        track(name)
        bounds, found = [], []
        for value in values:
            one = problem.but(d_x=int(value)) if what == "d_x" else problem
            epsilon = (value if what == "epsilon" else AT) * one.gradient_norm()
            sizes = one.sizes(epsilon, DELTA, proof)
            every = max(1, sizes.epochs // MANY)
            squares, _ = simulate(one, rates_of(sizes), sizes.epochs, range(seeds), every=every)
            runs = [math.nan if n is None else n * every for n in needed(squares, epsilon)]
            bounds.append(sizes.epochs)
            found.append(float(np.median(runs)))
        rows.append(
            {
                **{"case": name, "values": list(values), "bounds": bounds, "needed": found},
                **{"fit of bound": fit(values, bounds), "fit": fit(values, found)},
                "binding": sizes.binding["lr_zo"],
            }
        )
    return rows
