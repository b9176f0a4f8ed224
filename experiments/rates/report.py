"""Suggested rates beside searched ones, as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..plots import finish
from ..report import markdown

OTHER, BLIND = "Other task and adapter", "Blind"
ABOUT = {
    OTHER: (
        "Not blind: these best rates were known when the formula and its shares were chosen; "
        "the rule of `find_lr` was chosen by the calibration sweeps, and where it cuts a sweep "
        "off, after a row of this table had been seen.\n",
    ),
    BLIND: (
        "Suggested, and the suggestions committed, before any run of these grids (rates.blind). "
        "Not blind to the model, nor wholly to COPA: zeroth order had been run there at 1e-4 and "
        "3e-4, prompts and prefixes at 0.01 and 0.03 (README.md of experiments), and every method "
        "but full fine-tuning at its preset.\n",
    ),
}
RESCALED = (
    "Not asked again when the zeroth-order share went from 0.25 to 0.15, but multiplied by their "
    "ratio; those that were asked again gave the same to the last bit:\n\n"
)
MARKERS = "o^s"
FACTOR = 3.0
"""A suggestion is near where it is off by no more."""
Row = dict[str, Any]


def render(out: Path, rows: Sequence[Row], blind: Sequence[Row] = ()) -> None:
    """Write ``table.md`` and ``rates.png``."""
    parts = [
        "# Suggested and searched rates\n",
        "Suggestions are of the weights before training, by 4 batches of 16; best rates are those "
        "of the grids in ../directions, by the development loss on the first seed; * where it is "
        "the lowest or highest that was tried; + where it is a preset's. ``suggested`` is "
        "`suggest_hyperparameters`, over best in the next column; so is `find_lr`. The loss near "
        "the suggestion is that at the grid's nearest rate.\n",
    ]
    sections = _sections(rows, blind)
    for title, some in sections.items():
        parts += [f"## {title}\n", *ABOUT.get(title, ()), table(some), f"{summary(some)}\n"]
        rescaled = [f"{row['model']}, {row['task']}, {_name(row)}" for row in some if _old(row)]
        if rescaled:
            parts.append(RESCALED + "".join(f"- {name}\n" for name in rescaled))
        if title == BLIND:
            parts.append(f"Development losses:\n\n{losses(some)}")
    (out / "table.md").write_text("\n".join(parts), encoding="utf-8")
    plot(out / "rates.png", sections)


def _sections(rows: Sequence[Row], blind: Sequence[Row]) -> dict[str, Sequence[Row]]:
    """Rows by title, without empty ones."""
    found: dict[str, Sequence[Row]] = {
        "Calibration": [row for row in rows if not row["other"]],
        OTHER: [row for row in rows if row["other"]],
        BLIND: blind,
    }
    return {title: some for title, some in found.items() if some}


def _old(row: Row) -> bool:
    return bool(row.get("rescaled"))


def losses(rows: Sequence[Row]) -> str:
    """The start, and at each rate the loss of the best evaluation and at the end."""
    lines = []
    for row in rows:
        tried = (
            f"{rate}: {_loss(loss)}, end {_loss(row['ends'][rate])}"
            for rate, loss in row["losses"].items()
        )
        name = f"{row['task']}, {_name(row)}"
        lines.append(f"- {name}: start {row['start']:.3f}; {'; '.join(tried)}\n")
    return "".join(lines)


def _loss(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.3f}"


def _name(row: Row) -> str:
    return ", ".join(part for part in (row["method"], row["kind"]) if part)


def table(rows: Sequence[Row]) -> str:
    head = ["model", "task", "method", "rate", "best", "suggested", "over best", "find_lr"]
    head += ["over best", "loss at best", "near suggested", "seconds"]
    return markdown([head, *map(_line, rows)])


def _line(row: Row) -> list[str]:
    mark = "*" * row["at_an_end"] + "+" * row["preset"]
    line = [row["model"], row["task"], _name(row), row["rate"], f"{row['best']:.1g}{mark}"]
    for name in ("suggested", "find_lr"):
        value = row[name]
        if value is None:
            line += ["none" if name == "suggested" or "sweep" in row else "-", "-"]
        else:
            line += [f"{value:.2g}", f"{value / row['best']:.2g}"]
    found = row["losses"]
    if found and row["suggested"]:
        near = min(found, key=lambda rate: abs(math.log(float(rate) / row["suggested"])))
        best = min(loss for loss in found.values() if loss is not None)
        line += [f"{best:.3f}", _loss(found[near])]
    else:
        line += ["-", "-"]
    return [*line, f"{row['seconds']:.0f}"]


def summary(rows: Sequence[Row]) -> str:
    """How many are near."""
    said = []
    for name in ("suggested", "find_lr"):
        asked = [row for row in rows if name == "suggested" or "sweep" in row]
        near = sum(is_near(row[name], row["best"]) for row in asked)
        said += [f"{name}: {near} of {len(asked)}"] * bool(asked)
    return f"Within a factor {FACTOR:g} of the best rate: {'; '.join(said)}."


def is_near(rate: float | None, best: float) -> bool:
    return rate is not None and best / FACTOR <= rate <= FACTOR * best


def plot(path: Path, sections: Mapping[str, Sequence[Row]]) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 5), layout="constrained")
    for rate, colour in (("lr_zo", "#30638e"), ("lr_fo", "#d1495b")):
        for (title, rows), marker in zip(sections.items(), MARKERS, strict=False):
            some = [
                (row["best"], row["suggested"])
                for row in rows
                if row["rate"] == rate and row["suggested"]
            ]
            if some:
                label = f"{rate}, {title.lower()}"
                axis.plot(*zip(*some, strict=True), marker, color=colour, label=label)
    ends = [1e-5, 1.0]
    axis.plot(ends, ends, color="#555555")
    for factor in (FACTOR, 1 / FACTOR):
        axis.plot(ends, [factor * end for end in ends], ":", color="#555555")
    axis.set(xscale="log", yscale="log", xlabel="best rate of the grid", ylabel="suggested rate")
    axis.legend(frameon=False)
    finish(figure, f"Suggested rates, and a factor {FACTOR:g} on either side", path)
