"""Smoothness along a run as pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pictures import COLORS, figure

if TYPE_CHECKING:
    from .scatter import HybridSmoothness

SAID = {"fo": "first-order (adapter)", "zo": "zeroth-order (base)"}


def draw_rows(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Gradient norms, smoothness, and rates beside their limits; see `SmoothnessRecorder.plot`."""
    drawn = figure("SmoothnessRecorder.plot", (7, 9))
    norms, curvatures, rates = drawn.subplots(3, 1, sharex=True)
    for mode, color in COLORS.items():
        for axes, name, style in (
            (norms, "gradient_norm", "-"),
            (curvatures, "smoothness", "-"),
            (rates, "lr", "-"),
            (rates, "stable_lr", "--"),
        ):
            values = [row.get(f"{name}_{mode}") or 0.0 for row in rows]
            drawable = [v if v > 0 else math.nan for v in values]  # a logarithm; NaN breaks a line
            if any(v > 0 for v in values):
                label = f"{SAID[mode]}{', stable' if name == 'stable_lr' else ''}"
                steps = [row["step"] for row in rows]
                axes.plot(steps, drawable, style, color=color, label=label, marker=".")
    for axes, said in (
        (norms, "gradient norm"),
        (curvatures, "smoothness"),
        (rates, "learning rate"),
    ):
        axes.set_ylabel(said)
        if axes.lines:
            axes.set_yscale("log")
            _legend_above(axes)
    rates.set_xlabel("step")
    drawn.savefig(path)


def draw_scatter(
    points: Mapping[str, Any],
    fits: Mapping[str, HybridSmoothness],
    path: str | os.PathLike[str],
) -> None:
    """Curvature against the gradient's norm, a color a block; see :func:`plot_scatter`."""
    drawn = figure("plot_scatter", (7, 5))
    axes = drawn.subplots()
    for place, (name, (norms, curvatures)) in enumerate(points.items()):
        color = COLORS.get(name, f"C{place}")
        axes.scatter(norms, curvatures, s=14, color=color, label=SAID.get(name, name))
        positive = [norm for norm in norms if norm > 0]
        if name in fits and positive:
            t = np.geomspace(min(positive), max(positive), 200)
            fit = fits[name]
            label = f"{fit.constant:.3g}"
            if fit.slope:
                label += f" + {fit.slope:.3g} t^{fit.exponent:.2f}"
            axes.plot(t, fit(t), color=color, label=label)
    axes.set(xlabel="gradient norm t", ylabel="curvature", xscale="log", yscale="log")
    _legend_above(axes)
    drawn.savefig(path)


def _legend_above(axes: Any) -> None:
    """Where it covers no curve."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
