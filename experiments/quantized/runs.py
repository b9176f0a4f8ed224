"""Making the grid's runs, each a file: rates searched on one seed, the best one on the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from zofo_optim import HybridZOFO

from ..finetune import model_name
from ..kept import Kept
from ..methods import METHODS, AdapterOptions, prepare
from ..models import Problem
from ..partition.loop import train
from ..partition.problems import Sizes
from ..partition.setups import OPTIMIZERS, Setup
from ..report import Result
from ..search import SEARCHED, best_of, search
from .bases import with_base
from .grid import HYBRID, LORA, MU, NOTHING, SCALES, ZO, Cell, Study

TASK = "sst2"
_METHODS = {ZO: "zo", LORA: "fo-lora", HYBRID: "hybrid-lora"}


class Searches(Kept):
    """Makes and reads the runs of a model.

    Args:
        study: of the model.
        model: folder or hub id.
        out: folder of the runs of all models.
        seeds, data, sizes, console: see :class:`Kept`.
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
        console: Console | None = None,
    ) -> None:
        folder = out / model_name(model)
        super().__init__(model, TASK, folder, seeds, data=data, sizes=sizes, console=console)
        self.study = study
        self._bases: dict[str, Problem] = {}

    def searched(self, cell: Cell) -> dict[float, Result]:
        """By rate, on the first seed, in order of rates; empty where none is searched."""
        if not cell.searched:
            return {}
        start = self.study.starts[cell.method, cell.quantised]
        return search(start, lambda rate: self.run(cell, rate, SEARCHED))

    def results(self, cell: Cell) -> list[Result]:
        """At the best rate, one a seed; one, where there is no rate."""
        if not cell.searched:
            return [self.run(cell, None, SEARCHED)]
        rate = best_of(self.searched(cell))
        return [self.run(cell, rate, seed) for seed in self.seeds]

    def run(self, cell: Cell, rate: float | None, seed: int) -> Result:
        """Made, or read; see :meth:`Kept.kept`."""
        adapter = None if cell.adapter is None else best_of(self.searched(cell.adapter))
        place = self.folder / cell.folder / ("" if rate is None else f"{rate:g}")
        file = place / f"seed-{seed}.json"
        settings = {
            **{"model": self.name, "task": self.task, "cell": asdict(cell), "lr": rate},
            **{"lr_adapter": adapter, "seed": seed, "steps": self.study.steps},
            **{"batch": self.study.batch, "evaluations": self.study.evaluations},
            **asdict(self._sizes),
        }
        found = self.kept(file, settings)
        if found is None:
            found = {
                "settings": settings,
                "name": cell.name,
                **self._made(cell, rate, adapter, seed),
            }
            self.keep(file, found)
            self._tell(found)
        return found

    def _made(self, cell: Cell, rate: float | None, adapter: float | None, seed: int) -> Result:
        if cell.format not in self._bases:
            self._bases = {cell.format: with_base(self.problem, cell.format)}
        problem = self._bases[cell.format]
        if cell.method == NOTHING:
            dev = problem.dev.score(problem.base)
            best = {"step": 0, "loss": dev.loss, "accuracy": dev.accuracy}
            return {"best": best, "test": asdict(problem.test.score(problem.base))}
        assert rate is not None
        setup = set_up(problem, cell, rate, adapter, seed)
        study = self.study
        found = train(
            problem,
            setup,
            seed=seed,
            steps=study.steps,
            batch=study.batch,
            evaluations=study.evaluations,
        )
        return {**found, "test": asdict(problem.test.score(setup.model))}

    def _tell(self, result: Result) -> None:
        settings, test = result["settings"], result["test"]
        text = f"{self.name}: {result['name']}"
        if settings["lr"] is not None:
            text += f", {settings['lr']:g}, seed {settings['seed']}"
            text += f", {result['curve'][-1]['seconds']:.0f} s"
        text += f": development loss {result['best']['loss']:.3f}, test {test['loss']:.3f}"
        self.say(f"{text}, {100 * test['accuracy']:.1f} %")


def set_up(problem: Problem, cell: Cell, rate: float, adapter: float | None, seed: int) -> Setup:
    """What trains: scales of a quantised base or all weights of another, LoRA, or both.

    Args:
        rate: of the base, or of LoRA alone.
        adapter: rate of LoRA above a base that learns, too.
    """
    torch.manual_seed(seed)
    fo_rate = rate if cell.method == LORA else adapter
    model, groups = prepare(
        METHODS[_METHODS[cell.method]],
        problem,
        AdapterOptions(),
        zo={"lr": rate, "mu": MU[cell.quantised]},
        fo={} if fo_rate is None else {"lr": fo_rate},
        include=(SCALES,) if cell.quantised else (),
        quantized=_of_weights(cell),
    )
    model.train()
    fo_optimizer, options = OPTIMIZERS["adamw"]
    first_order: dict[str, Any] = {} if cell.method == ZO else options
    optimizer = HybridZOFO(
        groups, seed=seed, fo_optimizer=fo_optimizer, weight_decay=0, **first_order
    )
    return Setup(model, optimizer, lambda batch: problem.train.losses(model, batch).mean(), [], {})


def _of_weights(cell: Cell) -> str | None:
    """What becomes of quantised weights."""
    if not cell.quantised:
        return None
    return "frozen" if cell.method == LORA else "scales"
