"""Tables and plots of the grid: what each kind reaches, and in how many steps and seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..plots import band, finish
from ..report import Result, as_csv, curve_table, long_table, markdown, mean
from .grid import BASELINE, BESIDE_ADAPTERS, KINDS, NORMALIZED, Cell
from .runs import is_at_an_end
from .timing import RECIPE

Times = Mapping[str, Mapping[str, Any]]
FORWARDS = {"zo": 2, "hybrid": 1}
"""Evaluations without gradients in a step, by the first part of a method's name."""
COLOURS = ("#555555", "#E69F00", "#0072B2", "#D55E00", "#CC79A7")


class Found:
    """The runs of a task, by the cell's name.

    Args:
        cells: of the task, all that has been run.
        searched: of each, results by rate on the first seed.
        results: of each, results at the best rate, one a seed.
        times: of steps; empty where they are not measured yet.
    """

    def __init__(
        self,
        task: str,
        cells: Sequence[Cell],
        searched: Mapping[Cell, Mapping[float, Result]],
        results: Mapping[Cell, Sequence[Result]],
        times: Times,
    ) -> None:
        self.task, self.cells, self.times = task, list(cells), times
        self.searched, self.results = searched, results

    def cell(self, name: str) -> Cell | None:
        return next((cell for cell in self.cells if cell.name == name), None)

    def seconds(self, name: str) -> float | None:
        """Of a step."""
        return self.times[name]["seconds"] if name in self.times else None

    def reached(self, cell: Cell, loss: float) -> int | None:
        """Steps until the mean development loss over seeds is at most this."""
        curves = [run["curve"] for run in self.results[cell]]
        for points in zip(*curves, strict=False):
            if statistics.fmean(point["loss"] for point in points) <= loss:
                return int(points[0]["step"])
        return None

    def end(self, cell: Cell) -> float:
        """The mean over seeds of the last development loss."""
        return statistics.fmean(run["curve"][-1]["loss"] for run in self.results[cell])

    def rate(self, cell: Cell) -> float:
        return float(self.results[cell][0]["settings"][cell.rate])


def _row(found: Found, cell: Cell, target: float, seconds: float | None) -> list[str]:
    """A line: rate, losses, cost of a step, and what it takes to reach the target."""
    rate, runs = found.rate(cell), found.results[cell]
    mark = "*" if is_at_an_end(cell, rate) else ""
    reached = found.reached(cell, target)
    step = found.seconds(cell.name)
    line = [cell.name, f"{rate:g}{mark}", mean([r["curve"][-1]["loss"] for r in runs], 3)]
    line += [mean([r["test"]["loss"] for r in runs], 3)]
    if runs[0]["scored"]:
        line += [mean([r["test"]["accuracy"] for r in runs], 1, 100)]
    line += ["" if step is None else f"{1000 * step:.0f}"]
    line += ["-" if reached is None else str(reached)]
    if reached is None or step is None or not seconds:
        return [*line, "-", "-"]
    return [*line, f"{reached * step:.1f}", f"{seconds / (reached * step):.1f}"]


def _head(found: Found, first: str, baseline: str) -> list[str]:
    scored = next(iter(found.results.values()))[0]["scored"]
    return [
        *(first, "rate", "dev. loss", "test loss", *["test accuracy, %"] * scored),
        *("ms a step", "steps to it", "seconds to it", f"times faster than {baseline}"),
    ]


def alone(found: Found) -> str:
    """Zeroth order by kind, against MeZO's recipe, and full fine-tuning as the bound."""
    base = found.cell(f"zo, {BASELINE}")
    if base is None:
        return ""
    target, steps = found.end(base), int(found.results[base][0]["steps"])
    step = found.seconds(RECIPE)
    whole = None if step is None else step * steps
    rows = [_head(found, "zeroth order alone", RECIPE)]
    for name in [*(f"zo, {kind}" for kind in KINDS), "fo"]:
        cell = found.cell(name)
        if cell is not None:
            rows.append(_row(found, cell, target, whole))
    text = f"{RECIPE} ends at {target:.3f} after {steps} steps"
    if whole is not None and step is not None:
        text += f" of {1000 * step:.0f} ms, {whole:.1f} s (its losses: those of {BASELINE})"
    return f"{text}.\n\n{markdown(rows)}"


def beside(found: Found) -> str:
    """Hybrid against first order alone, by adapter."""
    parts = []
    for alone in [c for c in found.cells if c.method.startswith("fo-")]:
        adapter = alone.method.removeprefix("fo-")
        hybrid = found.cell(f"hybrid-{adapter}, {BESIDE_ADAPTERS}")
        if hybrid is None:
            continue
        target, steps = found.end(alone), int(found.results[alone][0]["steps"])
        step = found.seconds(alone.name)
        whole = None if step is None else step * (found.reached(alone, target) or steps)
        rows = [_head(found, adapter, alone.method)]
        rows += [_row(found, cell, target, whole) for cell in (alone, hybrid)]
        full = found.cell("fo")
        if full is not None:
            rows.append(_row(found, full, target, whole))
        parts.append(f"{alone.method} ends at {target:.3f}.\n\n{markdown(rows)}")
    return "\n".join(parts)


def rates(found: Found) -> str:
    """Development losses at the end of each searched run."""
    lines = []
    for cell in found.cells:
        tried = ", ".join(
            f"{rate:g}: {run['curve'][-1]['loss']:.3f}"
            for rate, run in found.searched[cell].items()
        )
        lines.append(f"- {cell.name}: {tried}\n")
    return "".join(lines)


def plot(path: Path, found: Found) -> None:
    """Development loss against steps, forward passes and seconds."""
    kinds = [c for kind in KINDS if (c := found.cell(f"zo, {kind}")) is not None]
    pairs = [c for c in found.cells if c.method.startswith(("fo-", "hybrid-"))]
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    for row, some in zip(axes, (kinds, pairs), strict=True):
        for cell in some:
            _line(row, found, cell)
        for axis, name in zip(row, ("steps", "forward passes", "seconds"), strict=True):
            axis.set(xlabel=name, ylabel="development loss")
        row[0].legend(frameon=False, fontsize=8)
    finish(figure, f"{found.task}: zeroth order alone (above), beside adapters (below)", path)


def _line(row: Any, found: Found, cell: Cell) -> None:
    first = cell.method.split("-")[0]
    if first == "zo":
        style: dict[str, Any] = dict(color=COLOURS[list(KINDS).index(cell.kind)])
    else:
        names = ("prompt", "prefix", "lora")
        style = dict(color=COLOURS[1 + names.index(cell.method.split("-")[1])])
        style["linestyle"] = "--" if first == "fo" else "-"
    # a gradient costs as much as two more passes
    passes = FORWARDS.get(first, 0) + 3 * (first != "zo")
    factors = [1.0, float(passes), found.seconds(cell.name)]
    for axis, factor in zip(row, factors, strict=True):
        if factor is None:
            continue
        scaled = [
            {"curve": [{**point, "x": factor * point["step"]} for point in run["curve"]]}
            for run in found.results[cell]
        ]
        band(axis, scaled, "loss", cell.name, "x", **style)


def normalized(studies: Mapping[str, Sequence[Found]]) -> str:
    """One rate for two models: losses of the rule at each rate, beside the plain rule's best."""
    name = f"zo, {NORMALIZED}"
    rows: list[list[Any]] = []
    for model, found_of in studies.items():
        for found in found_of:
            cell, plain = found.cell(name), found.cell(f"zo, {BESIDE_ADAPTERS}")
            if cell is None or plain is None:
                continue
            if not rows:
                heads = (f"{rate:g}" for rate in cell.rates)
                rows.append(["development loss", "start", *heads, "sgd at its best rate"])
            tried = [f"{run['curve'][-1]['loss']:.3f}" for run in found.searched[cell].values()]
            (*_, best) = [found.searched[plain][found.rate(plain)]]
            start = best["curve"][0]["loss"]
            end = f"{best['curve'][-1]['loss']:.3f} ({found.rate(plain):g})"
            rows.append([f"{model}, {found.task}", f"{start:.3f}", *tried, end])
    return markdown(rows) if rows else ""


def render(out: Path, studies: Mapping[str, Sequence[Found]]) -> None:
    """Write ``table.md``, ``runs.csv``, ``curves.csv`` and a plot for each model and task."""
    parts = ["# Kinds of directions\n"]
    parts.append(
        "Means over seeds, ± sample deviation, at the rate whose run on the first seed had the "
        "lowest development loss, so that seed favours all a little; rates at which another seed "
        "ended above its start are left out; * where the rate is the lowest or highest that was "
        "tried. Losses are those at the end of training; test losses, those of the best "
        "evaluation.\n"
    )
    rows: list[list[Any]] = []
    curves: list[list[Any]] = []
    for model, found_of in studies.items():
        for found in found_of:
            parts.append(f"## {model}, {found.task}\n")
            parts += [alone(found), beside(found), f"Searched:\n\n{rates(found)}"]
            name = f"{model}-{found.task}.png"
            plot(out / name, found)
            parts.append(f"![losses]({name})\n")
            for cell in found.cells:
                runs = {(r["settings"][cell.rate], r["seed"]): r for r in _all(found, cell)}
                for (rate, _), run in runs.items():
                    own = [model, cell.kind, rate]
                    rows += [[*own, *row] for row in long_table([run])[1:]]
                    curves += [[*own, *row] for row in curve_table([run])[1:]]
    rule = normalized(studies)
    if rule:
        parts.append(f"## One rate for several models: {NORMALIZED}\n\n{rule}")
    (out / "table.md").write_text("\n".join(parts), encoding="utf-8")
    head = ["model", "directions", "rate"]
    for name, head_of, body in (
        ("runs", long_table([])[0], rows),
        ("curves", curve_table([])[0], curves),
    ):
        text = as_csv([[*head, *head_of], *body])
        (out / f"{name}.csv").write_text(text, encoding="utf-8")


def _all(found: Found, cell: Cell) -> list[Result]:
    return [*found.searched[cell].values(), *found.results[cell]]
