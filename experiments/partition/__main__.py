"""Where hybrid first- and zeroth-order training pays: a grid of runs, and what steps cost.

    ZOFO_DATA=path/with/all python -m experiments.partition --out runs/partition
    python -m experiments.partition --plan              how long the runs will take
    python -m experiments.partition runs --minutes 50   what has begun by then
    python -m experiments.partition costs               steps at budgets from 0.1 to 0.9
    python -m experiments.partition report

Hi-ZFO's comparison (Jin, Tan, ACL Findings 2026): full fine-tuning; the tensors that are worth most
within a budget of FLOPs by first order, with the rest frozen or by zeroth order; zeroth order
alone; LoRA. And what else saves memory: LoRA in a few layers, a head, SGD inside the backward,
checkpointing. At equal steps, and at the seconds of full fine-tuning. The grid is in grid.py:
MiniLM on SST-2, stories260k on its sentences.

`OUT/MODEL/TASK/RECIPE/RATES/seed-N.json` is a run; one that is there is not made again, so an
interrupted command goes on where it was, but for the run that it was in. `OUT/MODEL/steps.json`:
seconds and memory of steps. `OUT/costs.json`: those of `costs`. The report, `OUT/table.md`,
`OUT/costs.md`, `runs.json` and plots, leaves out recipes that are not finished.

Needs, in a checkout: pip install -e ".[experiments]"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..commands import (
    Deadline,
    Ending,
    check_runs,
    data_folder,
    parts_first,
    quiet_on_one_thread,
    run_parts,
)
from ..kept import finished
from ..options import COUNT, INDEX, OUT, check_ranges, option, parse, some_of
from ..study_options import StudyOptions
from . import costs, plan, report
from .comparisons import Found
from .grid import Cell, cells, study_of
from .problems import default_models
from .runs import Searches

PARTS = ("steps", "runs", "costs", "report")
ABOUT = "Compare hybrid first- and zeroth-order training with what else saves memory."


@dataclass
class PartitionOptions(StudyOptions):
    """The command line of `partition`."""

    do: list[str] = option(list(PARTS), some_of(PARTS), choices=PARTS, metavar="PART")
    plan: bool = option(False, "say how long the runs will take, by measured steps, and stop")
    steps: int | None = option(None, "of a run; default: as in grid.py")
    tiers: list[int] = option([], "of the grid, see grid.py; default: all")
    out: Path = option(Path("runs/partition"), OUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"tiers": INDEX, "steps": COUNT})


class Command:
    """The parts of one command line."""

    def __init__(self, options: PartitionOptions, console: Console) -> None:
        self._options, self._console = options, console
        self._models = options.models or default_models()

    def _searches(self, made: bool) -> list[Searches]:
        given = self._options
        data = data_folder(given.data) if made else None
        return [
            Searches(
                study_of(model),
                model,
                given.out,
                given.seeds,
                data=data,
                sizes=given.sizes,
                steps=given.steps,
                console=self._console,
            )
            for model in self._models
        ]

    def steps(self) -> None:
        """Seconds and memory of each recipe's steps, before any run."""
        for searches in self._searches(made=True):
            searches.measure([cell for cell in cells(searches.study) if self._is_asked(cell)])

    def _is_asked(self, cell: Cell) -> bool:
        tiers = self._options.tiers
        return not tiers or cell.tier in tiers

    def plan(self) -> None:
        """How long all runs will take."""
        self.steps()
        plan.show(
            [
                (one, [cell for cell in cells(one.study) if self._is_asked(cell)])
                for one in self._searches(made=True)
            ],
            self._console,
        )

    def runs(self) -> None:
        """All that are not there, those that tell most first."""
        deadline = Deadline(self._options.minutes, self._console)
        for searches, cell in in_order(self._searches(made=True)):
            if not self._is_asked(cell):
                continue
            if deadline.is_over(cell.name):
                return
            searches.results(cell)

    def costs(self) -> None:
        """Steps at all budgets."""
        out = self._options.out
        for name, make in costs.MODELS.items():
            costs.measure(name, make(), out, self._console)

    def report(self) -> None:
        """Tables and plots of all that is finished."""
        out, found = self._options.out, []
        check_runs(out)
        for searches in self._searches(made=False):
            done = finished(searches.results, cells(searches.study))
            searched = {cell: searches.searched(cell) for cell in done}
            if done:
                found.append(Found(searches.study, searches.name, done, searched, searches.costs()))
        if found:
            report.render(out, found)
        if measured := costs.read(out):
            costs.render(out, measured)


def in_order(some: Sequence[Searches]) -> list[tuple[Searches, Cell]]:
    """Cells of all models by tier."""
    pairs = [(searches, cell) for searches in some for cell in cells(searches.study)]
    return sorted(pairs, key=lambda pair: pair[1].tier)


def main(argv: Sequence[str] | None = None) -> int:
    given = parts_first(argv, PARTS)
    options, parser = parse(PartitionOptions, "experiments.partition", ABOUT, given, epilog="")
    console = Console()
    quiet_on_one_thread()
    with Ending(parser, console) as ending:
        command = Command(options, console)
        if options.plan:
            command.plan()
            return 0
        run_parts(command, PARTS, options.do)
    if ending.code:
        return ending.code
    console.print(f"Runs and tables: {options.out}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
