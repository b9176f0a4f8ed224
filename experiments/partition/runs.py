"""Making the grid's runs, each a file: rates searched on one seed, the best one on the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from zofo_optim.whole import write_json

from ..finetune import machine, model_name, versions
from ..kept import Kept
from ..report import Result
from ..search import SEARCHED, best_of, search
from .grid import Cell, From, Study
from .loop import run
from .problems import Sizes
from .recipes import ALL, PLAIN, Recipe, Saving, savings_of, step_name
from .steps import StepCost, measured

TIMED_BATCHES, TIMED_ROUNDS = 10, 2
FULL = Recipe(ALL)


class Searches(Kept):
    """Makes and reads the runs of a model.

    Args:
        study: of the model.
        model: folder or hub id.
        out: folder of the runs of all models.
        seeds, data, sizes, console: see :class:`Kept`.
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
        super().__init__(
            model,
            study.task,
            out / model_name(model),
            seeds,
            data=data,
            sizes=sizes,
            console=console,
        )
        self.study, self.steps = study, steps or study.steps
        self._costs: dict[str, StepCost] | None = None

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
        which = cell.searched
        if which is None:
            return {}
        return search(
            self._start(cell, which), lambda rate: self._run(cell, SEARCHED, **{which: rate})
        )

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
        if not cell.equal_seconds:
            settings["steps"] = self.steps_of(cell)
        found = self.kept(file, settings, measured=("steps",) if cell.equal_seconds else ())
        if found is None:
            settings["steps"] = steps = self.steps_of(cell)
            found = {
                "settings": settings,
                "name": cell.name,
                **run(
                    self.problem,
                    cell.recipe,
                    lr_fo=rates["fo"],
                    lr_zo=rates["zo"],
                    seed=seed,
                    steps=steps,
                    batch=self.study.batch,
                    evaluations=self.study.evaluations,
                    partitions=self._partitions,
                ),
            }
            self.keep(file, found)
            self._tell(cell, place, found)
        return found

    def _tell(self, cell: Cell, rates: str, result: Result) -> None:
        first, *_, last = result["curve"]
        text = f"{self.name}: {cell.name}, {rates}, seed {result['settings']['seed']}: "
        text += f"development loss {first['loss']:.3f} -> {last['loss']:.3f}, "
        text += f"test {result['test']['loss']:.3f}"
        if result["scored"]:
            text += f", {100 * result['test']['accuracy']:.1f} %"
        self.say(f"{text}, {last['step']} steps in {last['seconds']:.0f} s")

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
            write_json(
                self._costs_file,
                {"steps": costs, "versions": versions(), "machine": machine(torch.device("cpu"))},
            )
            self._costs = costs
            one = costs[name]
            self.say(
                f"{self.name}: {name}: {1000 * one['seconds']:.0f} ms a step, "
                f"{one['peak_bytes'] / 1e6:.0f} MB"
            )
        return costs[name]

    def measure(self, cells: Sequence[Cell]) -> None:
        """Steps of all recipes of the cells, and of what saves memory in them."""
        for recipe in dict.fromkeys(cell.recipe for cell in cells):
            for saving in savings_of(recipe):
                self.cost(recipe, saving)
