"""Making the grid's runs: each cell's rates on one seed, then the best rate on the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..finetune import Runs
from ..kept import Unfinished
from ..report import Result
from ..search import SEARCHED, loss_of, seeds_of
from .grid import Cell


class Searches:
    """Makes and reads the runs of cells.

    Args:
        runs: of the command line; None: those that are there are read, and others
            :class:`Unfinished`.
        out: folder of the model's runs.
        seeds: of the best rate, the searched one among them.
    """

    def __init__(self, runs: Runs | None, out: Path, seeds: list[int]) -> None:
        self._runs, self._out = runs, out
        self._seeds = seeds_of(seeds)
        self._best: dict[Cell, float] = {}

    def searched(self, cell: Cell) -> dict[float, Result]:
        """By rate, on one seed."""
        return {rate: self._run(cell, rate, SEARCHED) for rate in cell.rates}

    def best(self, cell: Cell) -> float:
        """The rate with the lowest development loss of the best evaluation.

        Rates that lose more than they gain with another seed are left out, but where all do.
        """
        if cell not in self._best:
            losses = {rate: loss_of(run) for rate, run in self.searched(cell).items()}
            ordered = sorted(losses, key=losses.__getitem__)
            sound = (rate for rate in ordered if not any(map(_diverged, self._at(cell, rate))))
            self._best[cell] = next(sound, ordered[0])
        return self._best[cell]

    def results(self, cell: Cell) -> list[Result]:
        """At the best rate, one a seed."""
        return self._at(cell, self.best(cell))

    def _at(self, cell: Cell, rate: float) -> list[Result]:
        return [self._run(cell, rate, seed) for seed in self._seeds]

    def _run(self, cell: Cell, rate: float, seed: int) -> Result:
        fixed: dict[str, Any] = {**cell.options, cell.rate: rate}
        place = f"{cell.folder}/{rate:g}"
        if cell.after is not None:
            fixed["lr_fo"] = self.best(cell.after)
            place += f"-{fixed['lr_fo']:g}"
        folder = self._out / place / f"seed-{seed}"
        if self._runs is None:
            return _read(folder / "result.json")
        wanted = self._runs.settings(cell.task, cell.method, seed, **fixed)
        return self._runs.run(wanted, folder, f"{cell.task}: {cell.name}, {rate:g}, seed {seed}")


def _read(file: Path) -> Result:
    if not file.is_file():
        raise Unfinished(str(file))
    found: Result = json.loads(file.read_text(encoding="utf-8"))
    return found


def _diverged(run: Result) -> bool:
    """Whether it ends above its start."""
    start, end = (float(run["curve"][place]["loss"]) for place in (0, -1))
    return not end <= start


def is_at_an_end(cell: Cell, rate: float) -> bool:
    """Whether a better rate may lie outside of those searched."""
    return rate in (min(cell.rates), max(cell.rates))
