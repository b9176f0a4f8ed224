"""A blind check: rates are suggested where no grid exists, and only then is the grid run.

    python -m experiments.rates.blind --model path/to/stories260k --do suggest --out runs/rates
    python -m experiments.rates.blind --model path/to/stories260k --do grid --out runs/rates
    python -m experiments.rates --do report --out runs/rates

`OUT/blind/MODEL-suggested.json` is to be kept before the second line is run; `grid` needs it, and
changes nothing in it. Runs are those of `experiments.directions`, on one seed; where the best rate
is the lowest or highest of its grid, the grid grows there, at most twice. They are in
`OUT/blind/runs`, and `OUT/blind/MODEL-grid.json` has the losses of the grids that are done.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from zofo_optim.whole import write_json

from ..commands import RESUMES, Ending, run_parts
from ..directions.grid import BASELINE, BESIDE_ADAPTERS, Cell
from ..directions.runs import Searches
from ..files import DataError
from ..finetune import Runs, machine, model_name, versions
from ..models import DEFAULT_MODEL_PACKAGE
from ..options import OUT, Options, option, parse
from ..search import SEARCHED
from ..settings import OF_ZEROTH_ORDER
from .asked import setting, suggested

PARTS = ("suggest", "grid")
ABOUT = "Suggest rates where no grid exists; then, in a second call, run the grid."
FIXED = (OF_ZEROTH_ORDER - {"mu"}) | {
    *("methods", "seeds", "steps", "eval_every", "patience", "schedule", "optimizer", "lr_fo"),
    *("no_save", "overwrite", "report_to"),
}
FOLDER = "blind"
TASKS = ("copa", "wic")
STEPS, EVERY = 200, 20
OF_ZEROTH = (5e-5, 1e-4, 2e-4, 4e-4)
OF_PROMPTS = (1e-2, 3e-2, 1e-1, 3e-1)
GRID = {
    ("zo", BASELINE): OF_ZEROTH,
    ("zo", BESIDE_ADAPTERS): OF_ZEROTH,
    ("fo-prompt", ""): OF_PROMPTS,
    ("fo-prefix", ""): OF_PROMPTS,
    ("fo-lora", ""): (1e-3, 3e-3, 1e-2, 3e-2),
    ("fo", ""): (3e-4, 1e-3, 3e-3),
}
"""Rates by method and kind of directions; chosen before any suggestion was seen."""
GROWTH = 2
"""Rates that a grid gets at its ends, at most."""


@dataclass
class BlindOptions(Options):
    """The command line of `rates.blind`."""

    do: list[str] = option(["suggest"], f"one of {', '.join(PARTS)}", choices=PARTS, metavar="PART")
    tasks: list[str] = option(list(TASKS), "tasks", choices=TASKS)
    out: Path = option(Path("runs/rates"), OUT)


def cells(tasks: Sequence[str] = TASKS) -> Iterator[Cell]:
    for task in tasks:
        for (method, kind), rates in GRID.items():
            rate = "lr_zo" if method == "zo" else "lr_fo"
            yield Cell(task, STEPS, EVERY, method, kind, rate, rates)


def beyond(rates: Sequence[float], best: float) -> float | None:
    """The next rate at the end at which the best one lies; None: it lies inside.

    Its factor is the last but one there, so that 0.01, 0.03, 0.1, 0.3 goes on with 1.
    """
    rates = sorted(rates)
    if best == rates[-1]:
        further = rates[-1] * rates[-2] / rates[-3]
    elif best == rates[0]:
        further = rates[0] * rates[1] / rates[2]
    else:
        return None
    return float(f"{further:.2g}")


class Command:
    """The parts of one command line."""

    def __init__(self, options: BlindOptions, console: Console) -> None:
        self._options, self._console = options, console
        options.no_save = True
        self._runs = Runs(options, console)
        self._name = model_name(options.model or DEFAULT_MODEL_PACKAGE)
        self._folder = options.out / FOLDER

    def suggest(self) -> None:
        """Of all cells that have none yet."""
        found = _read(self._folder / f"{self._name}-suggested.json")
        there = {_key(row) for row in found}
        for cell in cells(self._options.tasks):
            if (cell.task, cell.method, cell.kind) not in there:
                optimizer, closures = setting(self._runs, cell, {cell.rate: cell.rates[0]})
                found.append(suggested(self._name, cell, optimizer, closures))
                self._write("suggested", found)
                said = f"{cell.task}: {cell.name}: suggested {found[-1]['suggested']}"
                self._console.print(said, highlight=False)

    def grid(self) -> None:
        """Of the cells with a suggestion."""
        there = {_key(row) for row in _read(self._folder / f"{self._name}-suggested.json")}
        if not there:
            raise DataError(f"--out must hold suggestions, got {str(self._options.out)!r}")
        searches = Searches(self._runs, self._folder / "runs" / self._name, [SEARCHED])
        found = _read(self._folder / f"{self._name}-grid.json")
        done = {_key(row) for row in found}
        for cell in cells(self._options.tasks):
            key = (cell.task, cell.method, cell.kind)
            if key in there and key not in done:
                found.append(_grown(searches, cell))
                self._write("grid", found)

    def _write(self, name: str, found: list[dict[str, Any]]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        about = {"versions": versions("scipy"), "machine": machine(self._runs.device)}
        write_json(self._folder / f"{self._name}-{name}.json", {**about, "rows": found})


def _grown(searches: Searches, cell: Cell) -> dict[str, Any]:
    """The losses of a cell's grid; None where a run had none."""
    further: float | None = None
    for _ in range(GROWTH + 1):
        if further is not None:
            cell = replace(cell, rates=tuple(sorted((*cell.rates, further))))
        runs = searches.searched(cell)
        losses = {rate: float(run["best"]["loss"]) for rate, run in runs.items()}
        further = beyond(cell.rates, _best(losses))
        if further is None:
            break
    return {
        "task": cell.task,
        "method": cell.method,
        "kind": cell.kind,
        "steps": cell.steps,
        "start": next(iter(runs.values()))["curve"][0]["loss"],
        "losses": {f"{rate:g}": _or_none(loss) for rate, loss in losses.items()},
        "ends": {f"{rate:g}": _or_none(run["curve"][-1]["loss"]) for rate, run in runs.items()},
        "best": _best(losses),
        "at_an_end": further is not None,
    }


def _best(losses: dict[float, float]) -> float:
    return min(losses, key=lambda rate: math.inf if math.isnan(losses[rate]) else losses[rate])


def _or_none(loss: float) -> float | None:
    return float(loss) if math.isfinite(loss) else None


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return found


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return (row["task"], row["method"], row["kind"])


def rows(folder: Path) -> list[dict[str, Any]]:
    """Suggestions that have a grid, as rows of the report."""
    found = []
    for file in sorted(folder.glob("*-suggested.json")):
        grids = _read(file.with_name(file.name.replace("-suggested", "-grid")))
        by_key = {_key(row): row for row in grids}
        for row in _read(file):
            if _key(row) in by_key:
                found.append({**row, **by_key[_key(row)], "preset": False, "find_lr": None})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options, parser = parse(BlindOptions, "experiments.rates.blind", ABOUT, argv, fixed=FIXED)
    console = Console()
    with Ending(parser, console, RESUMES) as ending:
        run_parts(Command(options, console), PARTS, options.do)
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())
