"""Making the grid's runs, each a file: rates searched on one seed, the best one on the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from torch import nn

from ..classification import Batch
from ..finetune import model_name
from ..kept import Kept
from ..models import Problem
from ..partition.problems import Sizes
from ..report import Result
from ..search import SEARCHED, best_of, search
from ..training import RunError
from . import methods
from .grid import LORA, NOTHING, PLUGGED, PROBE, SCALED, ZO, ZO_ALONE, Cell, Study
from .large import DEFAULT, Plugged, Way, plug
from .small import plain_copy, small_problem
from .texts import unlabelled

FIRST_HEADS = {"sst2": "prompts", "wic": "random"}


class Searches(Kept):
    """Makes and reads the runs of a model and a task.

    Args:
        study: of the model.
        task: one of its tasks.
        model: folder or hub id.
        out: folder of the runs of all models.
        seeds, data, sizes, console: see :class:`Kept`.
    """

    def __init__(
        self,
        study: Study,
        task: str,
        model: str,
        out: Path,
        seeds: Sequence[int],
        *,
        data: str | None = None,
        sizes: Sizes | None = None,
        console: Console | None = None,
    ) -> None:
        super().__init__(
            model,
            task,
            out / model_name(model) / task,
            seeds,
            data=data,
            sizes=sizes,
            console=console,
            head=FIRST_HEADS[task],
        )
        self.study = study
        self._small: dict[Cell, Problem] = {}

    @property
    def texts(self) -> list[Batch]:
        """What activations are recorded of."""
        return unlabelled(self.problem, self.study.batch)

    def small(self, cell: Cell) -> Problem:
        """That of the cell's small model; made once."""
        key = Cell(PLUGGED, cell.route, cell.layers)
        if key not in self._small:
            head = FIRST_HEADS[self.task]
            self._small[key] = small_problem(self.problem, cell.route, cell.layers, head)
        return self._small[key]

    # ---- rates -------------------------------------------------------------------------------

    def searched(self, cell: Cell) -> dict[float, Result]:
        """By rate, on the first seed, in order of rates; empty where none is searched."""
        if not cell.searched:
            return {}
        start = self.study.starts[cell.method]
        return search(start, lambda rate: self.run(cell, rate, SEARCHED))

    def rate(self, cell: Cell) -> float:
        """The best one."""
        return best_of(self.searched(cell))

    def results(self, cell: Cell) -> list[Result]:
        """At the best rate, one a seed; one, where there is no rate."""
        source = cell if cell.searched else cell.adapter
        if source is None:
            return [self.run(cell, None, SEARCHED)]
        return [self.run(cell, self.rate(source), seed) for seed in self.seeds]

    # ---- runs --------------------------------------------------------------------------------

    def run(self, cell: Cell, rate: float | None, seed: int) -> Result:
        """Made, or read; see :meth:`Kept.kept`."""
        file = self._file(cell, rate, seed)
        settings = {
            **{"model": self.name, "task": self.task, "cell": asdict(cell), "lr": rate},
            **{"seed": seed, "steps": self.study.steps, "longer": self.study.longer},
            **{"batch": self.study.batch, "evaluations": self.study.evaluations},
            **asdict(self._sizes),
        }
        found = self.kept(file, settings)
        if found is None:
            found = {"settings": settings, "name": cell.name, **self._made(cell, rate, seed)}
            self.keep(file, found)
            self._say(found)
        return found

    def _file(self, cell: Cell, rate: float | None, seed: int) -> Path:
        place = self.folder / cell.folder / ("" if rate is None else f"{rate:g}")
        return place / f"seed-{seed}.json"

    def _made(self, cell: Cell, rate: float | None, seed: int) -> Result:
        problem, study = self.problem, self.study
        if cell.method == NOTHING:
            return methods.untrained(problem)
        if cell.method == PROBE:
            return methods.probed(problem)
        assert rate is not None
        if cell.method == LORA:
            return methods.by_gradients(problem, study, rate, seed)[1]
        if cell.method == ZO:
            model = plain_copy(problem)
            return methods.by_forwards(problem, study, model, rate, None, seed)
        if cell.adapter is not None:
            return self._further(cell, cell.adapter, rate, seed)
        small, trained = methods.by_gradients(self.small(cell), study, rate, seed)
        assert isinstance(small, PeftModel)
        small.save_pretrained(str(self._adapter(cell, rate, seed)), save_embedding_layers=False)
        found = methods.transferred(problem, small, self.texts)[1]
        seconds = {"small": trained["seconds"]["training"], **found["seconds"]}
        return {**found, "small": trained, "seconds": seconds}

    def _further(self, cell: Cell, adapter: Cell, rate: float, seed: int) -> Result:
        """What is done to the large model with an adapter of another cell."""
        plugged, seconds = self.plugged(adapter, seed)
        if cell.method == SCALED:
            found = methods.scaled(self.problem, plugged.model)
        else:
            base = self.rate(ZO_ALONE)
            model, problem, study = plugged.model, self.problem, self.study
            found = methods.by_forwards(problem, study, model, base, rate, seed)
            found["lr_base"] = base
        return {**found, "seconds": {**seconds, **found["seconds"]}}

    def _adapter(self, cell: Cell, rate: float, seed: int) -> Path:
        return self._file(cell, rate, seed).with_name(f"adapter-{seed}")

    def trained_small(self, cell: Cell, seed: int) -> tuple[nn.Module, Result]:
        """The small model with the adapter of the best rate, and the run that trained it."""
        rate = self.rate(cell)
        result, folder = self.run(cell, rate, seed), self._adapter(cell, rate, seed)
        if not folder.is_dir():
            raise RunError(f"{folder} must hold the adapter of a run that is there, got no folder")
        model = plain_copy(self.small(cell))
        return PeftModel.from_pretrained(model, str(folder)), result

    def plugged(
        self, cell: Cell, seed: int, way: Way = DEFAULT
    ) -> tuple[Plugged, dict[str, float]]:
        """The large model with the adapter of a cell's best rate, and the seconds of both parts."""
        small, result = self.trained_small(cell, seed)
        plugged = plug(self.problem, small, self.texts, way)
        return plugged, {"small": result["seconds"]["small"], "transfer": plugged.seconds}

    def _say(self, result: Result) -> None:
        settings = result["settings"]
        text = f"{self.name}, {self.task}: {result['name']}"
        if settings["lr"] is not None:
            text += f", {settings['lr']:g}, seed {settings['seed']}"
        text += f": development loss {result['best']['loss']:.3f}, test "
        text += f"{result['test']['loss']:.3f}, {100 * result['test']['accuracy']:.1f} %"
        if "small" in result:
            text += f"; the small model's {100 * result['small']['test']['accuracy']:.1f} %"
        seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
        self.say(f"{text}; {seconds}")
