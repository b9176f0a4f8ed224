"""Figure 1 of Ma, Yu, Huang 2026: smoothness along training; of base and adapter, apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..finetune import model_name
from ..methods import METHODS
from ..plots import finish, panels
from ..report import markdown
from .numbers import short, with_error
from .options import TheoryOptions
from .studies import chosen
from .trajectory import NEXT, SAME, Row, planned, problem_of, rows_of

COLOURS = {
    **{NEXT: "#0072B2", SAME: "#D55E00"},
    **{"base": "#0072B2", "adapter": "#D55E00", "head": "#009E73"},
}


BLOCK_VECTORS = 10
"""Random vectors of a measurement of a block: the table has their standard error."""


class Figure1:
    """Either half of the figure.

    Args:
        methods: of what trains: "fo", the whole model, or hybrid ones.
        batches: that are measured at each point.
        by: the field whose values are drawn as lines of their own: "batch" or "block".
    """

    def __init__(self, methods: Sequence[str], batches: Sequence[str], by: str) -> None:
        self._methods, self._batches, self._by = tuple(methods), tuple(batches), by

    def measure(self, options: TheoryOptions, console: Console) -> dict[str, list[Row]]:
        """Rows by model, task and method."""
        found = {}
        for model, study in chosen(options):
            for method in self._methods:
                plan = planned(
                    *(options, model, study, method, options.seeds[0]),
                    points=study.points,
                    vectors=study.vectors if METHODS[method].fo_base else BLOCK_VECTORS,
                    blocks=("model", "base", "adapter", "head"),
                    batches=self._batches,
                )
                name = f"{model_name(model)}-{study.task}-{method}"
                file = options.out / "runs" / "fig1" / f"{name}-{plan.seed}.json"
                key = f"{model_name(model)}, {study.task}, {method.removeprefix('hybrid-')}"
                found[key] = rows_of(
                    plan, file, partial(problem_of, options, model, study), console
                )
        return found

    def table(self, content: dict[str, Any]) -> str:
        """Means over points; and, of blocks, how many times the base's are larger."""
        head = ["run", self._by, "parameters", "‖g‖", "‖H‖_F", "‖H‖_F/√d"]
        table = [[*head, "largest", "from", "to", "trace", "trace/largest"]]
        ratios = [["run", "base over", "‖H‖_F", "‖H‖_F/√d", "largest", "from", "to"]]
        for name, rows in content["result"].items():
            lines: dict[str, list[Row]] = {}
            for row in rows:
                lines.setdefault(row[self._by], []).append(row)
            table += [[name, line, *_cells(own)] for line, own in lines.items()]
            if base := lines.pop("base", None):
                ratios += [[name, line, *_ratios(base, own)] for line, own in lines.items()]
        text = (
            "Geometric means over the points of a run; the error of ‖H‖_F is a point's; of the "
            "eigenvalue of largest magnitude also its range. Means of the trace, and of it over "
            "that eigenvalue, are arithmetic. ‖H‖_F/√d is the root of E ‖Hv‖² over unit vectors v."
            "\n\n" + markdown(table)
        )
        if len(ratios) > 1:
            text += "\nHow many times the base's is larger; the range is of points:\n\n"
            text += markdown(ratios)
        return text

    def plot(self, path: Path, content: dict[str, Any]) -> None:
        """The eigenvalue, the Frobenius norm (dashed), and the gradient's norm (dotted); a file a
        model."""
        for model in dict.fromkeys(name.partition(",")[0] for name in content["result"]):
            own = {n: rows for n, rows in content["result"].items() if n.startswith(f"{model},")}
            figure, axes = panels(len(own))
            for axis, (name, rows) in zip(axes, own.items(), strict=True):
                for line in dict.fromkeys(row[self._by] for row in rows):
                    some = [row for row in rows if row[self._by] == line]
                    steps = [row["step"] for row in some]
                    colour = COLOURS[line]
                    axis.semilogy(steps, _sizes(some, "largest"), "o-", c=colour, label=line)
                    axis.semilogy(steps, _sizes(some, "frobenius"), "--", c=colour)
                    axis.semilogy(steps, _sizes(some, "gradient_norm"), ":", c=colour)
                axis.set(title=name.partition(", ")[2], xlabel="step of SGD")
                axis.legend(frameon=False, fontsize=8)
            axes[0].set_ylabel("|largest eigenvalue|; dashed ‖H‖_F; dotted ‖g‖")
            finish(figure, model, path.with_name(f"{path.stem}-{model}.png"))


def _sizes(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Magnitudes; NaN where there is none."""
    return [math.nan if row[name] is None else abs(row[name]) for row in rows]


def size(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """The geometric mean of magnitudes, where there are some; 0 where one is."""
    values = [value for value in _sizes(rows, name) if not math.isnan(value)]
    return statistics.geometric_mean(values) if values and all(values) else 0.0


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)] or [math.nan]


def _cells(rows: Sequence[Row]) -> list[str]:
    d = rows[0]["parameters"]
    norm, mean = size(rows, "frobenius"), size(rows, "largest")
    largest = _known(_sizes(rows, "largest"))
    errors = [row["frobenius_error"] / row["frobenius"] for row in rows if row["frobenius"]]
    trace = _mean([(row["trace"], row["trace_error"]) for row in rows])
    curved = [(abs(row["largest"]), row) for row in rows if row["largest"]]
    dimension = _mean([(row["trace"] / c, row["trace_error"] / c) for c, row in curved])
    values = [norm / math.sqrt(d), mean, min(largest), max(largest)]
    return [
        f"{d:,}",
        short(size(rows, "gradient_norm")),
        with_error(norm, norm * statistics.fmean(errors or [0.0])),
        *map(short, values),
        trace,
        dimension,
    ]


def _mean(values: Sequence[tuple[float, float]]) -> str:
    """Of values with errors."""
    if not values:
        return ""
    error = math.hypot(*(error for _, error in values)) / len(values)
    return with_error(statistics.fmean(value for value, _ in values), error)


def _ratios(base: Sequence[Row], block: Sequence[Row]) -> list[str]:
    """Of norms, as they are and over √d, and of eigenvalues."""
    norms = size(base, "frobenius") / (size(block, "frobenius") or math.nan)
    dimensions = math.sqrt(base[0]["parameters"] / block[0]["parameters"])
    largest = size(base, "largest") / (size(block, "largest") or math.nan)
    pairs = zip(_sizes(base, "largest"), _sizes(block, "largest"), strict=True)
    each = _known(mine / (others or math.nan) for mine, others in pairs)
    values = (norms, norms / dimensions, largest, min(each), max(each))
    return [short(value, 2) for value in values]


fig1a = Figure1(["fo"], [NEXT, SAME], "batch")
fig1b = Figure1(["hybrid-lora", "hybrid-prompt"], [NEXT], "block")
