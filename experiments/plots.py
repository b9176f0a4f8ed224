"""Figures of results: curves of loss and accuracy; the paper's Figures 2 and 3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .report import Result, cells

ADAPTER_COLOURS = {"": "#555555", "prompt": "#0072B2", "prefix": "#009E73", "lora": "#D55E00"}
PANELS = {
    "train_loss": "training loss",
    "loss": "development loss",
    "accuracy": "development accuracy, %",
}


def style(method: str) -> dict[str, Any]:
    """Colour by adapter; dashed for first order, whole for what uses zeroth order."""
    kind, _, adapter = method.partition("-")
    return {
        "color": ADAPTER_COLOURS.get(adapter, "#CC79A7"),
        "linestyle": "--" if kind == "fo" else "-",
    }


def band(
    axes: Any, runs: Sequence[Result], name: str, label: str, x: str = "step", **kwargs: Any
) -> None:
    """Mean over seeds and the range between them, as far as all seeds got."""
    points = min(len(run["curve"]) for run in runs)
    scale = 100 if name == "accuracy" else 1
    values = np.array([[scale * p[name] for p in r["curve"][:points]] for r in runs], dtype=float)
    places = np.mean([[p[x] for p in r["curve"][:points]] for r in runs], axis=0)
    axes.plot(places, values.mean(0), label=label, linewidth=1.6, **kwargs)
    if len(runs) > 1:
        colour = kwargs.get("color")
        axes.fill_between(
            places, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0
        )


def panels(count: int) -> tuple[Any, list[Any]]:
    """A figure of one row of panels."""
    size = (4.6 * count, 4)
    figure, axes = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False)
    return figure, list(axes[0])


def finish(figure: Any, title: str, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_curves(
    path: Path, results: Sequence[Result], title: str, by_seconds: bool = False
) -> None:
    """The paper's Figure 3 for one task: losses and accuracy against steps, and loss over time."""
    grid = cells(results)
    names = [n for n in PANELS if n != "accuracy" or results[0]["scored"]]
    count = len(names) + by_seconds
    figure, axes = panels(count)
    shown = [(name, "step") for name in names] + [("loss", "seconds")] * by_seconds
    for axis, (name, x) in zip(axes, shown, strict=True):
        for (_, method), runs in grid.items():
            band(axis, runs, name, method, x, **style(method))
        axis.set(xlabel=x, ylabel=PANELS[name])
    axes[0].legend(frameon=False, fontsize=8)
    finish(figure, title, path)


def diverges(runs: Sequence[Result]) -> bool:
    """Whether the mean training loss ends above its start, or is no number."""
    ends = ([run["curve"][i]["train_loss"] for run in runs] for i in (0, -1))
    first, last = (sum(losses) / len(losses) for losses in ends)
    return not last <= first


def plot_rates(
    path: Path, panels: Sequence[tuple[str, dict[str, list[Result]]]], title: str
) -> None:
    """The paper's Figure 2: training loss under a small, a large, and two learning rates."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 4), layout="constrained", sharey=True
    )
    for axis, (heading, lines) in zip(axes, panels, strict=True):
        for method, runs in lines.items():
            label = f"{method}, diverges" if diverges(runs) else method
            band(axis, runs, "train_loss", label, **style(method))
        axis.set(xlabel="step", title=heading)
        axis.title.set_fontsize(9)
        axis.legend(frameon=False, fontsize=8)
    curves = [run["curve"] for _, lines in panels for runs in lines.values() for run in runs]
    highest = max(curve[0]["train_loss"] for curve in curves)
    losses = [point["train_loss"] for curve in curves for point in curve]
    lowest = min(loss for loss in losses if math.isfinite(loss))
    room = highest - lowest
    axes[0].set(ylabel=PANELS["train_loss"], ylim=(lowest - 0.1 * room, highest + 0.8 * room))
    finish(figure, title, path)
