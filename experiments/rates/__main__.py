"""Rates that the library suggests before training, beside those that a search found.

    python -m experiments.rates --model path/to/stories260k --out runs/rates
    python -m experiments.rates --model path/to/stories260k --only calibration ...
    python -m experiments.rates --do report --out runs/rates

The settings are those of the grid of `experiments.directions`, whose best rates are read from its
committed results. Each is set up as its runs are, and `suggest_hyperparameters` and `find_lr` are
asked before the first step (parts `suggest` and `sweep`). The shares of lr* that are suggested were
fitted to the settings that `found.OTHERS` does not name; `--only calibration` asks for these
alone. A check on tasks whose best rates nobody knew is in blind.py.

`OUT/MODEL.json` receives the rows, `OUT/table.md` and `OUT/rates.png` are of all models there.

Needs, in a checkout: pip install -e ".[experiments]"
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from zofo_optim import HybridZOFO, find_lr
from zofo_optim.whole import write_json

from ..commands import ended, quiet_on_one_thread, run_parts
from ..directions.grid import Cell, cells, study_of
from ..files import DataError
from ..finetune import Runs, machine, model_name, versions
from ..models import DEFAULT_MODEL_PACKAGE
from ..options import OUT, Options, option, parse
from ..settings import OF_ZEROTH_ORDER
from . import blind, report
from .asked import setting, suggested
from .found import Searched, is_other, searched

PARTS = ("suggest", "sweep", "report")
ABOUT = "Compare the rates that the library suggests before training with those that a grid found."
FIXED = (OF_ZEROTH_ORDER - {"mu"}) | {
    *("methods", "seeds", "steps", "eval_every", "patience", "schedule", "optimizer", "lr_fo"),
    *("no_save", "overwrite", "report_to"),
}
"""Options that the grid sets, or that are of trainings."""


@dataclass
class RatesOptions(Options):
    """The command line of `rates`."""

    do: list[str] = option(
        list(PARTS), f"some of {', '.join(PARTS)}", choices=PARTS, metavar="PART"
    )
    only: str = option("all", "settings", choices=("all", "calibration", "other"))
    sweep_steps: int = option(60, "of each range test, at least 10")
    out: Path = option(Path("runs/rates"), OUT)


class Command:
    """The parts of one command line."""

    def __init__(self, options: RatesOptions, console: Console) -> None:
        self._options, self._console = options, console
        self._runs = Runs(options, console)
        self._name = model_name(options.model or DEFAULT_MODEL_PACKAGE)

    def suggest(self) -> None:
        """Asks for the rate of every setting that is not there yet."""
        rows = self._rows()
        there = {_key(row) for row in rows}
        for cell, best in self._cells():
            if (cell.task, cell.method, cell.kind) in there:
                continue
            rows.append(self._suggested(cell, best))
            self._write(rows)
            row = rows[-1]
            self._console.print(
                f"{cell.task}: {cell.name}: {cell.rate} best {row['best']:g}, suggested "
                f"{row['suggested']}",
                highlight=False,
            )

    def sweep(self) -> None:
        """A range test of every setting with a suggestion, where it has none yet."""
        rows = self._rows()
        by_key = {_key(row): row for row in rows}
        for cell, best in self._cells():
            row = by_key.get((cell.task, cell.method, cell.kind))
            if row is None or "sweep" in row:
                continue
            optimizer, closures = self._setting(cell, best)
            row.update(_swept(optimizer, closures, cell.rate, self._options.sweep_steps))
            self._write(rows)
            self._console.print(
                f"{cell.task}: {cell.name}: {cell.rate} best {row['best']:g}, find_lr "
                f"{row['find_lr']}",
                highlight=False,
            )

    @property
    def _file(self) -> Path:
        return self._options.out / f"{self._name}.json"

    def _rows(self) -> list[dict[str, Any]]:
        if not self._file.is_file():
            return []
        found: list[dict[str, Any]] = json.loads(self._file.read_text(encoding="utf-8"))["rows"]
        return found

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._options.out.mkdir(parents=True, exist_ok=True)
        about = {"versions": versions("scipy"), "machine": machine(self._runs.device)}
        write_json(self._file, {**about, "rows": rows})

    def _cells(self) -> Iterator[tuple[Cell, Searched]]:
        """Those that are asked for and have a best rate."""
        wanted = {"all": (True, False), "calibration": (False,), "other": (True,)}
        for cell in (cell for some in cells(study_of(self._name)) for cell in some):
            best = searched(self._name, cell)
            if best is not None and is_other(cell) in wanted[self._options.only]:
                yield cell, best

    def _setting(self, cell: Cell, best: Searched) -> tuple[HybridZOFO, list[Any]]:
        """At the grid's best rates; no suggestion depends on them."""
        rates = {cell.rate: best.best}
        if cell.after is not None:
            beside = searched(self._name, cell.after)
            assert beside is not None
            rates["lr_fo"] = beside.best
        return setting(self._runs, cell, rates)

    def _suggested(self, cell: Cell, best: Searched) -> dict[str, Any]:
        optimizer, closures = self._setting(cell, best)
        return {
            **suggested(self._name, cell, optimizer, closures),
            "other": is_other(cell),
            "best": best.best,
            "losses": {f"{rate:g}": loss for rate, loss in best.losses.items()},
            "at_an_end": best.is_at_an_end,
            "preset": not best.losses,
            "find_lr": None,
        }

    def report(self) -> None:
        """Of all models there."""
        files = sorted(self._options.out.glob("*.json"))
        if not files:
            raise DataError(f"--out must hold suggestions, got {str(self._options.out)!r}")
        rows = [r for f in files for r in json.loads(f.read_text(encoding="utf-8"))["rows"]]
        report.render(self._options.out, rows, blind.rows(self._options.out / blind.FOLDER))


def _swept(optimizer: HybridZOFO, closures: Sequence[Any], rate: str, steps: int) -> dict[str, Any]:
    started = time.perf_counter()
    found = find_lr(optimizer, closures, steps=steps, modes=(rate.removeprefix("lr_"),))
    test = found.zo if rate == "lr_zo" else found.fo
    assert test is not None
    return {
        "find_lr": test.lr,
        "sweep": {
            "rates": test.rates,
            "losses": test.losses,
            "lowest": test.lowest,
            "diverged": test.diverged,
            "seconds": time.perf_counter() - started,
        },
    }


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return (row["task"], row["method"], row["kind"])


def main(argv: Sequence[str] | None = None) -> int:
    options, parser = parse(RatesOptions, "experiments.rates", ABOUT, argv, fixed=FIXED)
    quiet_on_one_thread()
    console = Console()

    def run() -> None:
        run_parts(Command(options, console), PARTS, options.do)

    return ended(parser, console, run, f"Suggestions and tables: {options.out}")


if __name__ == "__main__":
    raise SystemExit(main())
