"""What the committed results say of each method, by model and task."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..kept import Unfinished
from ..partition.grid import Cell, Study
from ..partition.recipes import PLAIN, Recipe, Saving, step_name
from ..partition.regions import Point
from ..report import Result
from ..search import is_at_an_end
from . import runs
from .grid import ENCODER, STUDIES, cells, savings

STEPS = runs.RESULTS / "evidence" / "steps.json"


@dataclass(frozen=True)
class Entry:
    """A method on a task.

    Attributes:
        recipe: what trains how.
        runs: one a seed, at the best rate.
        at_an_end: whether a better rate may lie outside of those tried.
        costs: of its steps, by what saves memory; empty where they are not measured.
    """

    recipe: Recipe
    runs: Sequence[Result]
    at_an_end: bool
    costs: Mapping[Saving, Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def zeroth_order(self) -> bool:
        """Whether any of it is; else gradients train all that trains."""
        return bool(self.recipe.kind)

    @property
    def passes(self) -> float:
        """Of a step, in forward passes."""
        return float(self.costs[PLAIN]["passes"])

    @property
    def whole(self) -> float:
        """Forward passes that a run takes."""
        return self.passes * float(self.runs[0]["curve"][-1]["step"])

    @property
    def losses(self) -> list[float]:
        """Test losses of the weights of the best evaluation."""
        return [float(run["test"]["loss"]) for run in self.runs]

    @property
    def accuracies(self) -> list[float]:
        return [float(run["test"]["accuracy"]) for run in self.runs]

    def after(self, passes: float) -> list[float]:
        """The lowest development loss of each run until then, between evaluations a line."""
        return [_reached(run["curve"], passes / self.passes) for run in self.runs]

    def point(self, losses: Sequence[float], spent: float = 0.0) -> Point:
        return Point(self.name, self.zeroth_order, spent, tuple(losses))


def _reached(curve: Sequence[Mapping[str, float]], step: float) -> float:
    lowest = curve[0]["loss"]
    for before, after in pairwise(curve):
        if step <= before["step"]:
            break
        share = min(1.0, (step - before["step"]) / (after["step"] - before["step"]))
        here = before["loss"] + share * (after["loss"] - before["loss"])
        lowest = lowest if math.isnan(here) else min(lowest, here)
    return float(lowest)


@dataclass(frozen=True)
class Found:
    """All finished methods of a model and task."""

    study: Study
    entries: Sequence[Entry]
    forward: Mapping[str, Any] | None
    unit: str = "passes"
    """Of times: forward passes, or seconds."""

    @property
    def title(self) -> str:
        model = "MiniLM" if self.study.model == ENCODER else self.study.model
        task = {"sst2": "SST-2", "copa": "COPA", "winogrande": "WinoGrande", "wic": "WiC"}
        return f"{task.get(self.study.task, 'sentences')}, {model}"

    @property
    def where(self) -> str:
        """With steps and examples of a step."""
        return f"{self.title}, {self.study.steps} steps of {self.study.batch}"

    @property
    def scored(self) -> bool:
        return bool(self.entries[0].runs[0]["scored"])

    @property
    def start(self) -> float:
        """Development loss before any step, of the first method."""
        return float(self.entries[0].runs[0]["curve"][0]["loss"])

    def entry(self, name: str) -> Entry | None:
        return next((one for one in self.entries if one.name == name), None)

    @property
    def timed(self) -> list[Entry]:
        """Those whose step's time is known."""
        return [one for one in self.entries if "passes" in one.costs.get(PLAIN, {})]

    @property
    def shortest(self) -> float:
        """Forward passes of the method whose run takes the fewest: the time that all have."""
        return min(one.whole for one in self.timed)

    def memory_points(self) -> list[Point]:
        """Of every step that is measured, plain or saving memory: bytes and test losses."""
        return [
            Point(
                step_name(one.recipe, saving),
                one.zeroth_order,
                float(cost["peak_bytes"]),
                tuple(one.losses),
            )
            for one in self.entries
            for saving, cost in one.costs.items()
        ]


def read_costs(file: Path = STEPS) -> dict[str, Any]:
    """By model and task, then by the step's name; empty where nothing is measured."""
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["steps"]
    return found


def key(study: Study) -> str:
    """Of a study among the costs."""
    return f"{study.model}, {study.task}"


def read(files: Sequence[Path] = (runs.OTHERS, runs.COMMITTED), costs: Path = STEPS) -> list[Found]:
    """Of the committed runs; methods whose runs are not all there are left out."""
    with TemporaryDirectory() as folder:
        runs.restore(runs.committed(files), Path(folder))
        measured = read_costs(costs)
        found = [_found(study, Path(folder), measured.get(key(study), {})) for study in STUDIES]
    return [one for one in found if one.entries]


def _found(study: Study, out: Path, measured: Mapping[str, Any]) -> Found:
    there = runs.searches(study, out, made=False)
    entries = []
    for cell in cells(study):
        try:
            entries.append(_entry(cell, there.results(cell), there.searched(cell), measured))
        except Unfinished:
            continue
    order = [recipe.name for recipe in dict.fromkeys(cell.recipe for cell in in_page_order(study))]
    entries.sort(key=lambda one: order.index(one.name))
    return Found(study, entries, measured.get("forward pass"))


def in_page_order(study: Study) -> list[Cell]:
    """Gradients alone, zeroth order alone, both."""
    return sorted(cells(study), key=lambda cell: (bool(cell.recipe.kind), cell.recipe.is_hybrid))


def _entry(
    cell: Cell,
    results: Sequence[Result],
    searched: Mapping[float, Result],
    measured: Mapping[str, Any],
) -> Entry:
    costs = {
        saving: measured[name]
        for saving in (PLAIN, *savings(cell.recipe))
        if (name := step_name(cell.recipe, saving)) in measured
    }
    return Entry(cell.recipe, results, is_at_an_end(searched), costs)


def mean_of(values: Sequence[float]) -> float:
    """Infinite where one is no number."""
    found = statistics.fmean(values)
    return math.inf if math.isnan(found) else found
