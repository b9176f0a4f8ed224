"""Figures: losses over memory and over seconds; costs over budgets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..plots import band, finish
from ..report import Result
from .regions import Point

FIRST_ORDER, ZEROTH_ORDER, HYBRID = "#0072B2", "#555555", "#D55E00"


def colour(point: Point) -> str:
    """By order."""
    if point.hybrid:
        return HYBRID
    return ZEROTH_ORDER if point.name.startswith("ZO") else FIRST_ORDER


def pareto(path: Path, panels: Mapping[str, Sequence[Point]], what: str, title: str) -> None:
    """Means over seeds against what is spent, a panel each; bars are spreads, lines the fronts."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(7 * len(panels), 6), layout="constrained", squeeze=False
    )
    for axis, (name, points) in zip(axes[0], panels.items(), strict=True):
        for point in points:
            marker = "o" if point.hybrid else "s"
            axis.errorbar(
                *(point.spent, point.mean, point.spread),
                **{"fmt": marker, "color": colour(point), "markersize": 5, "elinewidth": 0.8},
            )
            axis.annotate(
                *(point.name, (point.spent, point.mean)),
                **{"fontsize": 6, "xytext": (3, 3), "textcoords": "offset points", "rotation": 40},
            )
        for hybrid in (True, False):
            own = [point for point in points if point.hybrid == hybrid]
            if own:
                axis.step(
                    *zip(*front(own), strict=True),
                    **{"where": "post", "color": HYBRID if hybrid else FIRST_ORDER},
                    **{"linewidth": 1, "linestyle": "--"},
                    label="best hybrid" if hybrid else "best of the rest",
                )
        axis.set(xlabel=name, ylabel=what)
        axis.legend(frameon=False, fontsize=8)
    finish(figure, title, path)


def front(points: Sequence[Point]) -> list[tuple[float, float]]:
    """What is spent and the lowest mean for as much, in order."""
    found: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point.spent, point.mean)):
        if not found or point.mean < found[-1][1]:
            found.append((point.spent, point.mean))
    return [*found, (max(point.spent for point in points), found[-1][1])]


def curves(path: Path, lines: Mapping[str, Sequence[Result]], title: str) -> None:
    """Development loss against steps and against seconds of each run's own steps."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
    shades = plt.get_cmap("tab20")
    for number, (name, runs) in enumerate(lines.items()):
        style = "--" if " + " in name else ":" if name.startswith("ZO") else "-"
        for axis, x in zip(axes, ("step", "seconds"), strict=True):
            band(axis, runs, "loss", name, x, color=shades(number % 20), linestyle=style)
            axis.set(xlabel=x, ylabel="development loss")
    axes[1].legend(frameon=False, fontsize=7)
    finish(figure, title, path)


def budgets(
    path: Path,
    lines: Mapping[str, Mapping[float, tuple[float, float]]],
    levels: Mapping[str, tuple[float, float]],
    title: str,
) -> None:
    """Milliseconds and MB of a step over budgets.

    Args:
        lines: by name, and budget: milliseconds and MB.
        levels: those of methods that have no budget.
    """
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    shades = plt.get_cmap("tab10")
    for place, (axis, name) in enumerate(zip(axes, ("ms a step", "peak MB"), strict=True)):
        for number, (line, costs) in enumerate(lines.items()):
            values = [pair[place] for pair in costs.values()]
            axis.plot(list(costs), values, "o-", color=shades(number), label=line, markersize=4)
        for level, pair in levels.items():
            axis.axhline(pair[place], color="#999999", linewidth=0.8)
            axis.annotate(
                *(level, (0.005, pair[place])),
                **{"xycoords": ("axes fraction", "data"), "fontsize": 7, "va": "bottom"},
            )
        axis.set(xlabel="budget", ylabel=name, ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)
    finish(figure, title, path)


def mean_of(runs: Sequence[Result], name: str) -> float:
    """Of the test scores."""
    return statistics.fmean(run["test"][name] for run in runs)
