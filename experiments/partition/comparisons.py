"""What runs say: points to compare, what zeroth order adds, where hybrids are best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..report import Result, markdown
from ..summary import standard_error
from .grid import Cell, Study
from .recipes import COUPLING, PLAIN, Recipe, savings_of, step_name
from .regions import ALONE, LOSES, TIES, WINS, Point, Region, regions, verdict
from .runs import FULL
from .steps import StepCost

METRICS: Mapping[str, Callable[[Result], float]] = {
    "test loss": lambda run: float(run["test"]["loss"]),
    "test error": lambda run: 1 - float(run["test"]["accuracy"]),
}
"""The lower the better; an error is 1 less the accuracy."""
UNITS = {"memory": ("MB", 1e6), "seconds": ("s", 1.0)}
"""Of what is spent."""
VERDICTS = {
    WINS: "**hybrid**",
    LOSES: "the rest",
    TIES: "within the spread",
    ALONE: "only hybrids fit",
}


@dataclass
class Found:
    """What there is of a model.

    Attributes:
        study: its own.
        name: of the model.
        results: of finished cells, one a seed at the best rates.
        searched: of these, by rate on the first seed.
        costs: of steps, by :func:`recipes.step_name`.
    """

    study: Study
    name: str
    results: Mapping[Cell, Sequence[Result]]
    searched: Mapping[Cell, Mapping[float, Result]]
    costs: Mapping[str, StepCost]

    def plain(self, *, equal_seconds: bool = False, times: int = 1) -> list[Cell]:
        """Cells but for ablations, at equal steps, so many times the study's, or at equal seconds.

        Full fine-tuning is in the latter too: its seconds are those that others have.
        """
        return [
            cell
            for cell in self.results
            if not is_ablation(cell)
            and cell.times == times
            and (cell.equal_seconds == equal_seconds or (equal_seconds and cell.recipe == FULL))
        ]

    def metrics(self) -> list[str]:
        """That the task has."""
        scored = any(run["scored"] for runs in self.results.values() for run in runs)
        return list(METRICS)[: 1 + scored]


def is_ablation(cell: Cell) -> bool:
    """Whether it is Hi-ZFO with another coupling than its own, or with a given ratio of rates."""
    return cell.ratio is not None or (cell.coupled and cell.recipe.coupling != COUPLING)


def points(found: Found, some: Sequence[Cell], metric: str, spent: str) -> list[Point]:
    """Of cells whose steps are measured; over memory, also with what saves it in them.

    Args:
        spent: "memory", bytes of a step; or "seconds", of all steps.
    """
    made = []
    for cell in some:
        for saving in savings_of(cell.recipe) if spent == "memory" else (PLAIN,):
            name = step_name(cell.recipe, saving)
            if name in found.costs:
                cost, steps = found.costs[name], found.results[cell][0]["settings"]["steps"]
                amount = cost["peak_bytes"] if spent == "memory" else steps * cost["seconds"]
                made.append(_point(found, cell, metric, name, amount))
    return made


def _point(found: Found, cell: Cell, metric: str, name: str, spent: float) -> Point:
    runs = found.results[cell]
    losses = tuple(METRICS[metric](run) for run in runs)
    error = 0.0
    if metric == "test error":
        error = standard_error(statistics.fmean(losses), runs[0]["test_examples"])
    return Point(name, cell.recipe.is_hybrid, spent, losses, error)


def additions(found: Found, metric: str) -> str:
    """Each hybrid beside the same first-order part with the rest frozen; "" where there is none.

    Bold where the means differ by more than the larger spread; seeds have the same batches, so a
    difference that all of them share is told, too.
    """
    by: dict[tuple[Recipe | None, bool, int], Cell] = {
        (cell.recipe, cell.equal_seconds, cell.times): cell
        for cell in found.results
        if cell.ratio is None
    }
    rows = [["first-order part", "the rest by", f"{metric}", "rest frozen", "better by"]]
    rows[0] += ["spread", "seed by seed"]
    for cell in found.results:
        alone = by.get((cell.recipe.second, cell.equal_seconds, cell.times))
        if alone is None:
            continue
        hybrid, frozen = (_point(found, one, metric, "", 0.0) for one in (cell, alone))
        better = f"{frozen.mean - hybrid.mean:+.3f}"
        if verdict(hybrid, frozen) in (WINS, LOSES):
            better = f"**{better}**"
        what = cell.name.removeprefix(f"{alone.recipe.name} + ")
        line = [alone.recipe.name, what, value(hybrid), value(frozen), better]
        pairs = zip(frozen.losses, hybrid.losses, strict=True)
        each = ", ".join(f"{other - own:+.3f}" for other, own in pairs)
        rows.append([*line, f"{max(hybrid.spread, frozen.spread):.3f}", each])
    return markdown(rows) if len(rows) > 1 else ""


def value(point: Point) -> str:
    """Mean and spread."""
    return f"{point.mean:.3f} ± {point.spread:.3f}"


def where(made: Sequence[Point], metric: str, spent: str) -> str:
    """In words and a table: from which amount to which a hybrid is best, and where never.

    "" unless there are hybrids and others.
    """
    if not 0 < sum(point.hybrid for point in made) < len(made):
        return ""
    unit, scale = UNITS[spent]
    parts = regions(made)
    won = _joined([part for part in parts if part.verdict == WINS])
    if won:
        places = "; ".join(_between(part, unit, scale) for part in won)
        text = f"a hybrid is best by more than the spread {places}"
        if won[-1].below < math.inf:
            text += f", and nowhere from {won[-1].below / scale:.4g} {unit} on"
    else:
        text = f"no hybrid is best by more than the spread, whatever the {spent}"
    rows = [[spent, "best hybrid", metric, "best of the rest", metric, "best"]]
    for part in parts:
        line = [_between(part, unit, scale)]
        for point in (part.hybrid, part.other):
            line += ["none", ""] if point is None else [point.name, value(point)]
        rows.append([*line, VERDICTS[part.verdict]])
    return f"By {metric}, {text}.\n\n{markdown(rows)}"


def _joined(parts: Sequence[Region]) -> list[Region]:
    """Neighbours as one."""
    found = list(parts[:1])
    for part in parts[1:]:
        if found[-1].below == part.least:
            found[-1] = found[-1]._replace(below=part.below)
        else:
            found.append(part)
    return found


def _between(part: Region, unit: str, scale: float) -> str:
    text = f"from {part.least / scale:.4g}"
    if part.below == math.inf:
        return f"{text} {unit} on"
    return f"{text} to {part.below / scale:.4g} {unit}"
