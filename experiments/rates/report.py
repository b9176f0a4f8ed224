"""Suggested rates beside searched ones, as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..plots import finish
from ..report import markdown

FACTOR = 3.0
"""A suggestion is near where it is off by no more."""
Row = dict[str, Any]


def render(out: Path, rows: Sequence[Row]) -> None:
    """Write ``table.md`` and ``rates.png``."""
    parts = [
        "# Suggested and searched rates\n",
        "Suggestions are of the weights before training, by 4 batches of 16; best rates are those "
        "of the grids in ../directions, by the development loss on the first seed; * where it is "
        "the lowest or highest that was tried; + where it is a preset's. ``suggested`` is "
        "`suggest_hyperparameters`, over best in the next column; so is `find_lr`. The loss near "
        "the suggestion is that at the grid's nearest rate.\n",
    ]
    for title, held_out in (("Calibration", False), ("Held out", True)):
        some = [row for row in rows if row["held_out"] is held_out]
        if some:
            parts += [f"## {title}\n", table(some), f"{summary(some)}\n"]
    (out / "table.md").write_text("\n".join(parts), encoding="utf-8")
    plot(out / "rates.png", rows)


def table(rows: Sequence[Row]) -> str:
    head = ["model", "task", "method", "rate", "best", "suggested", "over best", "find_lr"]
    head += ["over best", "loss at best", "near suggested", "seconds"]
    return markdown([head, *map(_line, rows)])


def _line(row: Row) -> list[str]:
    mark = "*" * row["at_an_end"] + "+" * row["preset"]
    name = ", ".join(part for part in (row["method"], row["kind"]) if part)
    line = [row["model"], row["task"], name, row["rate"], f"{row['best']:.1g}{mark}"]
    for name in ("suggested", "find_lr"):
        value = row[name]
        if value is None:
            line += ["none" if name == "suggested" or "sweep" in row else "-", "-"]
        else:
            line += [f"{value:.2g}", f"{value / row['best']:.2g}"]
    losses = row["losses"]
    if losses and row["suggested"]:
        near = min(losses, key=lambda rate: abs(math.log(float(rate) / row["suggested"])))
        line += [f"{min(losses.values()):.3f}", f"{losses[near]:.3f}"]
    else:
        line += ["-", "-"]
    return [*line, f"{row['seconds']:.0f}"]


def summary(rows: Sequence[Row]) -> str:
    """How many are near."""
    said = []
    for name in ("suggested", "find_lr"):
        asked = [row for row in rows if name == "suggested" or "sweep" in row]
        near = sum(is_near(row[name], row["best"]) for row in asked)
        said.append(f"{name}: {near} of {len(asked)}")
    return f"Within a factor {FACTOR:g} of the best rate: {'; '.join(said)}."


def is_near(rate: float | None, best: float) -> bool:
    return rate is not None and best / FACTOR <= rate <= FACTOR * best


def plot(path: Path, rows: Sequence[Row]) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 5), layout="constrained")
    for rate, colour in (("lr_zo", "#30638e"), ("lr_fo", "#d1495b")):
        for held_out, marker in ((False, "o"), (True, "^")):
            some = [
                (row["best"], row["suggested"])
                for row in rows
                if row["rate"] == rate and row["held_out"] is held_out and row["suggested"]
            ]
            if some:
                label = f"{rate}, {'held out' if held_out else 'calibration'}"
                axis.plot(*zip(*some, strict=True), marker, color=colour, label=label)
    ends = [1e-5, 1.0]
    axis.plot(ends, ends, color="#555555")
    for factor in (FACTOR, 1 / FACTOR):
        axis.plot(ends, [factor * end for end in ends], ":", color="#555555")
    axis.set(xscale="log", yscale="log", xlabel="best rate of the grid", ylabel="suggested rate")
    axis.legend(frameon=False)
    finish(figure, f"Suggested rates, and a factor {FACTOR:g} on either side", path)
