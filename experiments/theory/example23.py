"""Example 2.3 of Ma, Yu, Huang 2026: f = a ‖x‖² + b y², x by zeroth order, y by first order.

With one variable each, and directions of ±1, a two-sided estimate of a quadratic's gradient is
exact: the optimizer takes the steps of the paper's example. In d dimensions the estimate v v'∇f has
d times the gradient's mean square, and ‖x‖² is multiplied on average, at a rate η, by

    1 - 4 a η + 4 a² η² d

in each step: by d - 1 at the rate 1/(2a) of the example, by 1 - 1/d at the best rate, 1/(2 a d).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from zofo_optim import HybridZOFO

from ..plots import finish, panels
from ..report import markdown
from .options import TheoryOptions

A, B = 10.0, 0.1
STEPS = 40
DIMENSIONS = (1, 4, 16, 64)
REPEATS, REPEATED = 100, 4
"""Runs whose directions differ, and their steps, that the mean factor is taken over."""
DIVERGED = 1e6
"""A run ends where ‖x‖ is larger: there 64 bits would soon not show a perturbation."""
ROUNDING = 1e-12
"""What is less is 0 but for rounding."""

RATES = {
    "one rate, 1/(2a)": (1 / (2 * A), 1 / (2 * A)),
    "one rate, 1/(2b)": (1 / (2 * B), 1 / (2 * B)),
    "1/(2a) and 1/(2b)": (1 / (2 * A), 1 / (2 * B)),
}
"""By name: of x, of y."""


def descend(d: int, lr_x: float, lr_y: float, seed: int, steps: int) -> Iterator[dict[str, float]]:
    """‖x‖, ‖y‖ before each step and after the last; both are 1 at first, x all equal. float64.

    Ends early where it has diverged.
    """
    x = nn.Parameter(torch.full((d,), 1 / math.sqrt(d), dtype=torch.float64), requires_grad=False)
    y = nn.Parameter(torch.ones(1, dtype=torch.float64))
    groups = [
        {"params": [x], "mode": "zo", "lr": lr_x, "mu": 1e-3},
        {"params": [y], "mode": "fo", "lr": lr_y},
    ]
    optimizer = HybridZOFO(groups, distribution="rademacher", estimator="two_sided", seed=seed)
    for step in range(steps + 1):
        point = {"x": float(x.norm()), "y": float(y.detach().abs())}
        yield point
        if step == steps or point["x"] > DIVERGED:
            return
        optimizer.zero_grad()
        optimizer.step(lambda: A * x.square().sum() + B * y.square().sum())


def factors(d: int, lr: float, repeats: int) -> tuple[float, float]:
    """By which ‖x‖² is multiplied in a step: the mean over steps and runs; its standard error.

    Directions are independent of x, so each step's factor has the same mean.
    """
    found = []
    for seed in range(repeats):
        norms = [point["x"] for point in descend(d, lr, 1 / (2 * B), seed, REPEATED)]
        found += [(after / before) ** 2 for before, after in pairwise(norms) if before > ROUNDING]
    return statistics.fmean(found), statistics.stdev(found) / math.sqrt(len(found))


def expected_factor(d: int, lr: float) -> float:
    """The mean factor, with directions of ±1."""
    return 1 - 4 * A * lr + 4 * A**2 * lr**2 * d


def measure(options: TheoryOptions, console: Console) -> dict[str, Any]:
    curves = {name: list(descend(1, *rates, seed=0, steps=STEPS)) for name, rates in RATES.items()}
    dimensions = []
    for d in DIMENSIONS:
        for name, lr in (("1/(2a)", 1 / (2 * A)), ("1/(2ad)", 1 / (2 * A * d))):
            mean, error = factors(d, lr, REPEATS)
            expected = expected_factor(d, lr)
            curve = [point["x"] for point in descend(d, lr, 1 / (2 * B), 0, STEPS)]
            dimensions.append(
                {"d": d, "rate": name, "lr": lr, "factor": mean, "error": error}
                | {"expected": expected, "x": curve}
            )
    return {"a": A, "b": B, "curves": curves, "dimensions": dimensions}


def table(content: dict[str, Any]) -> str:
    result = content["result"]
    rows = [
        ["rates", "‖x‖ after 1 step", "‖y‖ after 1 step", "steps", "‖x‖ at last", "‖y‖ at last"]
    ]
    for name, curve in result["curves"].items():
        first, last = ([_shown(curve[step][which]) for which in "xy"] for step in (1, -1))
        rows.append([name, *first, str(len(curve) - 1), *last])
    factors = [["dimensions of x", "rate of x", "factor of ‖x‖² a step", "expected"]]
    for one in result["dimensions"]:
        seen = f"{one['factor']:.3f} ± {one['error']:.3f}"
        factors.append([str(one["d"]), one["rate"], seen, f"{one['expected']:.3f}"])
    return (
        f"f = a ‖x‖² + b y², a = {result['a']:g}, b = {result['b']:g}; ‖x‖ and ‖y‖ start at 1. A "
        f"run ends where ‖x‖ is above {DIVERGED:.0e}.\n\n{markdown(rows)}\nIn more dimensions, the "
        f"mean factor of ‖x‖² over the first {REPEATED} steps of {REPEATS} runs, ± standard "
        f"error:\n\n{markdown(factors)}"
    )


def _shown(value: float) -> str:
    return f"{value:.2g}" if value > ROUNDING else "0"


def plot(path: Path, content: dict[str, Any]) -> None:
    result = content["result"]
    figure, axes = panels(4)
    for axis, (name, curve) in zip(axes, result["curves"].items(), strict=False):
        for which, colour in (("x", "#D55E00"), ("y", "#0072B2")):
            values = [max(point[which], ROUNDING) for point in curve]
            axis.semilogy(values, "o-", markersize=3, color=colour, label=f"‖{which}‖")
        axis.set(title=name)
    for one in result["dimensions"]:
        colour = f"C{DIMENSIONS.index(one['d'])}"
        best = one["rate"] == "1/(2ad)"
        values = [max(value, ROUNDING) for value in one["x"]]
        style, label = ("-", f"‖x‖, d = {one['d']}") if best else ("--", None)
        axes[3].semilogy(values, style, color=colour, label=label)
    axes[3].set(title="1/(2ad); dashed: 1/(2a)")
    for axis in axes:
        axis.set(xlabel="step", xlim=(-1, STEPS + 1), ylim=(ROUNDING / 3, 10 * DIVERGED))
        axis.legend(frameon=False, fontsize=8)
    finish(figure, f"f = a ‖x‖² + b y², a = {result['a']:g}, b = {result['b']:g}", path)
