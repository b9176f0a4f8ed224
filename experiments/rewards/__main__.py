"""A score of generated text rises without a gradient: how fast, beside what else there is.

    ZOFO_DATA=path/with/all python -m experiments.rewards --out runs/rewards
    python -m experiments.rewards --do runs --rewards style --model path/to/stories260k
    python -m experiments.rewards --do report

Three scores of texts that go on from "Once upon a time": the share of words that begin with s
(``style``), whether the text is two whole sentences (``format``), and how negative MiniLM finds it,
by a probe on SST-2 (``sentiment``), with and without a penalty for divergence from the start. The
grid is in grid.py: a population in one ``generate()`` by its size, rank, rule and noise; full-size
Gaussian directions, one a ``generate()``; a policy gradient; TRL's GRPO. Every rate is searched on
one seed, by the mean of the run's curve.

`OUT/REWARD/METHOD/RATE/seed-N.json` is a run; one that is there is not made again. `memory` writes
`OUT/memory.json`. The report, `OUT/table.md`, `runs.csv`, `curves.csv` and plots, leaves out cells
that are not finished.

Needs, in a checkout: pip install -e ".[experiments]"; for GRPO also trl.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from zofo_optim.whole import write_json

from ..commands import check_runs, run_study
from ..files import DataError
from ..kept import finished
from ..options import COUNT, OUT, check_ranges, option, parse
from ..study_options import SearchOptions
from . import report
from .grid import GRPO, REWARDS, Cell, cells
from .runs import Runs

PARTS = ("runs", "memory", "report")
ABOUT = "Let scores of generated text rise, with and without gradients, and compare."


@dataclass
class RewardsOptions(SearchOptions):
    """The command line of `rewards`."""

    do: list[str] = option(
        list(PARTS), f"some of {', '.join(PARTS)}", choices=PARTS, metavar="PART"
    )
    rewards: list[str] = option(
        list(REWARDS), f"some of {', '.join(REWARDS)}", choices=tuple(REWARDS), metavar="REWARD"
    )
    model: str | None = option(
        None, "causal language model, hub id or folder; default: models/stories260k in ZOFO_DATA"
    )
    data: str | None = option(None, "folder of SST-2, for sentiment; default: in ZOFO_DATA")
    steps: int | None = option(None, "of a run, at most; default: as in grid.py")
    evaluation_texts: int = option(64, "fresh texts that a point of a curve is the mean of")
    out: Path = option(Path("runs/rewards"), OUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"steps": COUNT, "evaluation_texts": COUNT})


class Command:
    """The parts of one command line."""

    def __init__(self, options: RewardsOptions, console: Console) -> None:
        self._options, self._console = options, console

    def _makers(self) -> Runs:
        given = self._options
        return Runs(
            given.out,
            given.seeds,
            model=given.model or _default_model(),
            data=given.data,
            steps=given.steps,
            texts=given.evaluation_texts,
            console=self._console,
        )

    def _cells(self) -> Iterator[Cell]:
        for reward in self._options.rewards:
            yield from cells(reward)

    def _possible(self) -> Iterator[Cell]:
        has_trl = importlib.util.find_spec("trl") is not None
        for cell in self._cells():
            if cell.method == GRPO and not has_trl:
                self._console.print("GRPO is left out: trl is not installed")
            else:
                yield cell

    def runs(self) -> None:
        """All that are not there."""
        runs = self._makers()
        for cell in self._possible():
            runs.results(cell)

    def memory(self) -> None:
        """Of a step of each kind of cell."""
        runs, file = self._makers(), self._options.out / "memory.json"
        found = _memory(file)
        for cell in self._possible():
            if cell.kind not in found:
                found[cell.kind] = runs.memory(cell)
                write_json(file, found)

    def report(self) -> None:
        """Tables and plots of all rewards that have runs."""
        out = self._options.out
        check_runs(out)
        runs = Runs(out, self._options.seeds)
        done = finished(runs.results, (cell for reward in REWARDS for cell in cells(reward)))
        found = [report.Found(cell, runs.searched(cell), one) for cell, one in done.items()]
        report.render(out, found, _memory(out / "memory.json"))


def _memory(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
    return found


def _default_model() -> str:
    data = os.environ.get("ZOFO_DATA")
    if not data:
        raise DataError(
            "--model must be given, or the environment variable ZOFO_DATA name the folder with "
            "models/stories260k, got neither"
        )
    return str(Path(data) / "models" / "stories260k")


def main(argv: Sequence[str] | None = None) -> int:
    options, parser = parse(RewardsOptions, "experiments.rewards", ABOUT, argv, epilog="")
    return run_study(Command, options, parser, PARTS)


if __name__ == "__main__":
    raise SystemExit(main())
