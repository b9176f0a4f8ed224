"""Making the grid's runs, each a file: rates searched on one seed, the best one on the others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..finetune import machine, model_name, versions
from ..models import Problem
from ..report import Result
from ..training import RunError, write
from .grid import MOST_TRIED, RATES, Cell, From, Study
from .loop import run
from .problems import Sizes, load
from .recipes import ALL, PLAIN, Recipe, Saving, savings_of, step_name
from .steps import StepCost, measured

SEARCHED = 0
"""The seed that rates are searched on."""
TIMED_BATCHES, TIMED_ROUNDS = 10, 2
FULL = Recipe(ALL)


class Unfinished(Exception):
    """A run or a time is not there, and must not be made."""


class Searches:
    """Makes and reads the runs of a model.

    Args:
        study: of the model.
        model: folder or hub id.
        out: folder of the runs of all models.
        seeds: of the best rate, the searched one among them.
        data: folder of the tasks' data; None: what is there is read, what is not is
            :class:`Unfinished`.
        sizes: numbers of examples.
        steps: in place of the study's.
    """

    def __init__(
        self,
        study: Study,
        model: str,
        out: Path,
        seeds: Sequence[int],
        *,
        data: str | None = None,
        sizes: Sizes | None = None,
        steps: int | None = None,
        console: Console | None = None,
    ) -> None:
        self.study, self.name = study, model_name(model)
        self._model, self._data, self._console = model, data, console
        self._sizes, self.steps = sizes or Sizes(), steps or study.steps
        self.folder = out / self.name
        self.seeds = [SEARCHED, *(seed for seed in seeds if seed != SEARCHED)]
        self._problem: Problem | None = None
        self._costs: dict[str, StepCost] | None = None

    @property
    def problem(self) -> Problem:
        """Loaded once.

        Raises:
            Unfinished: there are no data.
        """
        if self._data is None:
            raise Unfinished(f"the data of {self.study.task}")
        if self._problem is None:
            self._problem = load(self._model, self.study.task, self._data, self._sizes)
        return self._problem

    # ---- rates -------------------------------------------------------------------------------

    def rate(self, cell: Cell, which: str) -> float | None:
        """The best one of ``fo`` or ``zo``: searched, or another cell's, or of the ratio."""
        if which == "zo" and cell.ratio is not None:
            first = self.rate(cell, "fo")
            assert first is not None
            return cell.ratio * first
        source: float | From | Cell | None = getattr(cell, which)
        if isinstance(source, Cell):
            return self.rate(source, which)
        return None if source is None else best_of(self.searched(cell))

    def _start(self, cell: Cell, which: str) -> float:
        source: float | From = getattr(cell, which)
        if isinstance(source, float):
            return source
        rate = self.rate(source.cell, which)
        assert rate is not None
        return rate

    def searched(self, cell: Cell) -> dict[float, Result]:
        """By rate, on the first seed, in order of rates; empty where none is searched."""
        if cell.searched is None:
            return {}
        found: dict[float, Result] = {}
        for rate in climb(self._start(cell, cell.searched), found):
            found[rate] = self._run(cell, SEARCHED, **{cell.searched: rate})
        return dict(sorted(found.items()))

    def results(self, cell: Cell) -> list[Result]:
        """At the best rates, one a seed."""
        return [self._run(cell, seed) for seed in self.seeds]

    def _run(self, cell: Cell, seed: int, **given: float) -> Result:
        rates = {which: given.get(which) or self.rate(cell, which) for which in ("fo", "zo")}
        place = "-".join(f"{rate:g}" for rate in rates.values() if rate is not None)
        file = self.folder / cell.folder / place / f"seed-{seed}.json"
        settings: dict[str, Any] = {
            **{"model": self.name, "task": cell.task, "recipe": asdict(cell.recipe)},
            **{f"lr_{which}": rate for which, rate in rates.items()},
            **{"seed": seed, "batch": self.study.batch, **asdict(self._sizes)},
            **{"evaluations": self.study.evaluations, "equal_seconds": cell.equal_seconds},
        }
        if file.is_file():
            found: Result = json.loads(file.read_text(encoding="utf-8"))
            there = {name: value for name, value in found["settings"].items() if name != "steps"}
            steps = found["settings"]["steps"]
            if self._data is not None and (
                there != settings or (not cell.equal_seconds and steps != self.steps_of(cell))
            ):
                raise RunError(f"{file} holds a run with other settings: take another --out")
            return found
        if self._data is None:
            raise Unfinished(str(file))
        settings["steps"] = steps = self.steps_of(cell)
        problem = self.problem
        result: Result = {
            "settings": settings,
            "name": cell.name,
            **run(
                problem,
                cell.recipe,
                lr_fo=rates["fo"],
                lr_zo=rates["zo"],
                seed=seed,
                steps=steps,
                batch=self.study.batch,
                evaluations=self.study.evaluations,
                partitions=self._partitions,
            ),
            "versions": versions(),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, result)
        self._say(cell, place, result)
        return result

    def _say(self, cell: Cell, rates: str, result: Result) -> None:
        first, *_, last = result["curve"]
        text = f"{self.name}: {cell.name}, {rates}, seed {result['settings']['seed']}: "
        text += f"development loss {first['loss']:.3f} -> {last['loss']:.3f}, "
        text += f"test {result['test']['loss']:.3f}"
        if result["scored"]:
            text += f", {100 * result['test']['accuracy']:.1f} %"
        if self._console is not None:
            self._console.print(
                f"{text}, {last['step']} steps in {last['seconds']:.0f} s",
                highlight=False,
                soft_wrap=True,
            )

    # ---- steps' costs ------------------------------------------------------------------------

    def steps_of(self, cell: Cell) -> int:
        """Of a run; at equal seconds, those that take as long as all of full fine-tuning's."""
        if not cell.equal_seconds:
            return self.steps * cell.times
        seconds = self.steps * self.cost(FULL)["seconds"]
        return max(1, round(seconds / self.cost(cell.recipe)["seconds"]))

    def costs(self) -> Mapping[str, StepCost]:
        """Those that have been measured, by :func:`recipes.step_name`."""
        file = self._costs_file
        if self._costs is None:
            self._costs = {}
            if file.is_file():
                self._costs = json.loads(file.read_text(encoding="utf-8"))["steps"]
        return self._costs

    @property
    def _partitions(self) -> Path:
        return self.folder / "partitions"

    @property
    def _costs_file(self) -> Path:
        return self.folder / "steps.json"

    def cost(self, recipe: Recipe, saving: Saving = PLAIN) -> StepCost:
        """Of a step: measured once, kept in a file.

        Raises:
            Unfinished: it is not there, and there are no data.
        """
        name = step_name(recipe, saving)
        costs = dict(self.costs())
        if name not in costs:
            costs[name] = measured(
                self.problem,
                recipe,
                saving,
                batch=self.study.batch,
                count=TIMED_BATCHES,
                rounds=TIMED_ROUNDS,
                partitions=self._partitions,
            )
            self.folder.mkdir(parents=True, exist_ok=True)
            write(
                self._costs_file,
                {"steps": costs, "versions": versions(), "machine": machine(torch.device("cpu"))},
            )
            self._costs = costs
            if self._console is not None:
                one = costs[name]
                self._console.print(
                    f"{self.name}: {name}: {1000 * one['seconds']:.0f} ms a step, "
                    f"{one['peak_bytes'] / 1e6:.0f} MB",
                    highlight=False,
                )
        return costs[name]

    def measure(self, cells: Sequence[Cell]) -> None:
        """Steps of all recipes of the cells, and of what saves memory in them."""
        for recipe in dict.fromkeys(cell.recipe for cell in cells):
            for saving in savings_of(recipe):
                self.cost(recipe, saving)


def climb(start: float, found: Mapping[float, Result]) -> Iterator[float]:
    """Rates to try, from a start up or down the grid until the best one lies between others.

    Args:
        start: of :data:`grid.RATES`.
        found: runs by rate, that of each rate yielded before the next one is asked for.

    Raises:
        ValueError: the start is not on the grid.
    """
    if start not in RATES:
        raise ValueError(f"start must be on the grid of rates, got {start:g}")
    yield start
    while len(found) < MOST_TRIED:
        best = RATES.index(best_of(found))
        untried = [
            RATES[at]
            for at in (best + 1, best - 1)
            if 0 <= at < len(RATES) and RATES[at] not in found
        ]
        if not untried:
            return
        yield untried[0]


def best_of(found: Mapping[float, Result]) -> float:
    """The rate whose run has the lowest development loss; of equal ones, the lowest rate."""
    return min(sorted(found), key=lambda rate: _loss(found[rate]))


def is_at_an_end(found: Mapping[float, Result]) -> bool:
    """Whether a better rate may lie outside of those tried."""
    best = best_of(found)
    return best in (min(found), max(found))


def _loss(run: Result) -> float:
    loss = float(run["best"]["loss"])
    return math.inf if math.isnan(loss) else loss
