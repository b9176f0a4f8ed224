"""The page's pictures: losses over time, and losses over memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..partition.recipes import PLAIN
from ..plots import band, finish
from .found import Entry, Found, mean_of

COLOURS = {
    "full": "#000000",
    "full by SGD": "#999999",
    "LoRA": "#D55E00",
    "prompt": "#0072B2",
    "prefix": "#009E73",
    "0.3 of flops": "#CC79A7",
    "": "#E69F00",
}
"""By what trains by first order."""
WIDE = 4


def _style(entry: Entry) -> dict[str, Any]:
    """Colour by the first-order part; whole lines for what uses zeroth order."""
    first = entry.name.split(" + ")[0] if entry.recipe.first else ""
    alone = entry.name == "ZO Gaussian"
    return {
        "color": "#8B4513" if alone else COLOURS[first],
        "linestyle": "-" if entry.zeroth_order else "--",
    }


def _panels(count: int, height: float) -> tuple[Any, list[Any]]:
    rows = -(-count // WIDE)
    wide = min(count, WIDE)
    figure, axes = plt.subplots(
        rows, wide, figsize=(4.2 * wide, height * rows), layout="constrained", squeeze=False
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.remove()
    return figure, flat[:count]


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    labels: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(
        labels.values(), labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )


def over_time(path: Path, found: Sequence[Found]) -> None:
    """Development loss over forward passes, until the quickest run's end and beyond."""
    own = [one for one in found if one.timed]
    figure, axes = _panels(len(own), 3.6)
    for axis, one in zip(axes, own, strict=True):
        for entry in one.timed:
            scaled = [
                {"curve": [{**p, "passes": entry.passes * p["step"]} for p in run["curve"]]}
                for run in entry.runs
            ]
            band(axis, scaled, "loss", entry.name, "passes", **_style(entry))
        axis.axvline(one.shortest, color="#bbbbbb", linewidth=1)
        lowest = min(p["loss"] for e in one.timed for run in e.runs for p in run["curve"])
        axis.set(
            xlabel="seconds" if one.unit == "s" else "forward passes",
            ylabel="development loss",
            title=one.title,
            ylim=(lowest - 0.05 * (one.start - lowest), one.start + 0.3 * (one.start - lowest)),
        )
    _legend(figure, axes)
    finish(figure, "Equal time; the grey line is where the quickest run ends", path)


def over_memory(path: Path, found: Sequence[Found]) -> None:
    """Test loss over the most that a step takes; open marks where a saving is applied."""
    own = [one for one in found if one.memory_points()]
    figure, axes = _panels(len(own), 3.6)
    for axis, one in zip(axes, own, strict=True):
        for entry in one.entries:
            for saving, cost in entry.costs.items():
                axis.plot(
                    cost["peak_bytes"] / 1e6,
                    mean_of(entry.losses),
                    marker="o" if entry.zeroth_order else "s",
                    markerfacecolor=_style(entry)["color"] if saving == PLAIN else "none",
                    markeredgecolor=_style(entry)["color"],
                    linestyle="none",
                    label=entry.name if saving == PLAIN else None,
                )
        axis.set(xlabel="MB", ylabel="test loss", title=one.title)
    _legend(figure, axes)
    finish(figure, "Equal memory; circles use zeroth order, open marks save memory", path)
