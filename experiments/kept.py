"""Runs of a study as files: made once, read afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from zofo_optim.whole import write_json

from .finetune import model_name, versions
from .models import Problem
from .partition.problems import Sizes, load
from .report import Result
from .search import seeds_of
from .training import RunError

C = TypeVar("C")


class Unfinished(Exception):
    """A run or a time is not there, and must not be made."""


def kept(
    file: Path, settings: Mapping[str, Any], *, made: bool, measured: Collection[str] = ()
) -> Result | None:
    """The run that a file holds; None: it is to be made.

    Args:
        settings: that the run must have, where runs are made; where they are only read, it may be
            of any.
        made: whether what is not there is made.
        measured: settings that followed from a measurement, and need not be the same.

    Raises:
        RunError: it holds a run with other settings.
        Unfinished: it is not there, and must not be made.
    """
    if not file.is_file():
        if made:
            return None
        raise Unfinished(str(file))
    found: Result = json.loads(file.read_text(encoding="utf-8"))
    there = {name: value for name, value in found["settings"].items() if name not in measured}
    if made and there != json.loads(json.dumps(settings)):
        raise RunError(f"{file} holds a run with other settings: take another --out")
    return found


class Kept:
    """Runs of a model and a task, each a file: read where it is there, else made and written.

    Args:
        model: folder or hub id.
        task: one of :data:`experiments.tasks.TASKS`.
        folder: of the runs.
        seeds: of the best rate, the searched one among them.
        data: folder of the tasks' data; None: what is there is read, what is not is
            :class:`Unfinished`.
        sizes: numbers of examples.
        head: an encoder's first one; None: as :func:`partition.problems.load` chooses it.
    """

    def __init__(
        self,
        model: str,
        task: str,
        folder: Path,
        seeds: Sequence[int],
        *,
        data: str | None,
        sizes: Sizes | None,
        console: Console | None,
        head: str | None = None,
    ) -> None:
        self.task, self.name, self.folder = task, model_name(model), folder
        self.seeds = seeds_of(seeds)
        self._model, self._data, self._console, self._head = model, data, console, head
        self._sizes = sizes or Sizes()
        self._problem: Problem | None = None

    @property
    def problem(self) -> Problem:
        """Loaded once.

        Raises:
            Unfinished: there are no data.
        """
        if self._data is None:
            raise Unfinished(f"the data of {self.task}")
        if self._problem is None:
            self._problem = load(self._model, self.task, self._data, self._sizes, self._head)
        return self._problem

    def kept(
        self, file: Path, settings: Mapping[str, Any], measured: Collection[str] = ()
    ) -> Result | None:
        """What a file holds; see :func:`kept`."""
        return kept(file, settings, made=self._data is not None, measured=measured)

    def keep(self, file: Path, found: Result) -> None:
        """Write a result, with the versions that made it."""
        write_json(file, {**found, "versions": versions()})

    def say(self, text: str) -> None:
        """A line about a run that was made."""
        if self._console is not None:
            self._console.print(text, highlight=False, soft_wrap=True)


def finished(results: Callable[[C], list[Result]], cells: Iterable[C]) -> dict[C, list[Result]]:
    """Runs at the best rates, of the cells that are complete."""
    found = {}
    for cell in cells:
        try:
            found[cell] = results(cell)
        except Unfinished:
            continue
    return found
