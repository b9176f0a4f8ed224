"""Every method at equal steps, equal time and equal memory, on every task: runs, and the page.

    python -m experiments.evidence                draw docs/evidence.md from committed results
    ZOFO_DATA=path/with/all python -m experiments.evidence runs steps --minutes 60

The grid is in grid.py. A run is a file under `--out`; one that is there, or committed, is not made
again. `runs` and `steps` write what they made to results/evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from zofo_optim.whole import write_json

from ..commands import Deadline, Ending, parts_first, quiet_on_one_thread, run_parts
from ..finetune import machine, versions
from ..options import OUT, option, parse
from ..partition.grid import Cell
from ..partition.recipes import step_name
from ..partition.runs import Searches
from . import found, runs, seven, steps
from .grid import ENCODER, STUDIES, cells, savings

CPU = torch.device("cpu")

PARTS = ("runs", "steps", "peaks", "page")
ABOUT = "Compare all methods at equal steps, time and memory; the page is docs/evidence.md."


@dataclass
class EvidenceOptions:
    """The command line of `evidence`."""

    do: list[str] = option(["page"], f"some of {', '.join(PARTS)}", choices=PARTS, metavar="PART")
    tiers: list[int] = option([], "of the grid, see grid.py; default: all")
    tasks: list[str] = option([], "default: all")
    minutes: float | None = option(None, "no run begins after so many minutes; default: all do")
    out: Path = option(Path("runs/evidence"), OUT)


class Command:
    """The parts of one command line."""

    def __init__(self, options: EvidenceOptions, console: Console) -> None:
        self._options, self._console = options, console

    def runs(self) -> None:
        """All that are not there, those that tell most first; committed when one is made."""
        given, deadline = self._options, Deadline(self._options.minutes, self._console)
        known = runs.committed()
        runs.restore(known, given.out)
        pairs = [
            (runs.searches(study, given.out, made=True, console=self._console), cell)
            for study in STUDIES
            if study.task in (given.tasks or (study.task,))
            for cell in cells(study)
            if cell.tier in (given.tiers or (cell.tier,))
        ]
        for one, cell in sorted(pairs, key=_order):
            if deadline.is_over(cell.name):
                return
            one.results(cell)
            runs.store(runs.collect(given.out, runs.committed([runs.OTHERS])), runs.COMMITTED)

    def steps(self) -> None:
        """Time and memory of each method's step, those that are not measured yet."""
        for study in STUDIES:
            if study.task not in (self._options.tasks or (study.task,)):
                continue
            measured = found.read_costs()
            own = measured.setdefault(found.key(study), {})
            problem = runs.searches(study, self._options.out, made=True).problem
            if steps.FORWARD not in own:
                own[steps.FORWARD] = steps.of_forward(problem, study)
            for recipe, saving in steps.steps_of(study):
                name = step_name(recipe, saving)
                if name in own:
                    continue
                own[name] = steps.of_step(problem, study, recipe, saving)
                write_json(
                    found.STEPS,
                    {"steps": measured, "versions": versions(), "machine": machine(CPU)},
                )
                self._console.print(
                    f"{found.key(study)}: {name}: {own[name]['passes']:.2f} forward passes, "
                    f"{own[name]['peak_bytes'] / 1e6:.1f} MB",
                    highlight=False,
                )

    def peaks(self) -> None:
        """Memory of the seven methods' steps where they save it."""
        measured = seven.read_peaks()
        for one in seven.read():
            if found.key(one.study) in measured:
                continue
            methods = [entry.recipe for entry in one.entries if savings(entry.recipe)]
            problem = runs.searches(
                one.study, self._options.out, made=True, sizes=seven.SIZES
            ).problem
            measured[found.key(one.study)] = steps.peaks(problem, one.study, methods)
            write_json(seven.PEAKS, {"peaks": measured, "versions": versions()})

    def page(self) -> None:
        """The page and its pictures, of what is committed."""
        from . import page

        page.draw()


def _order(pair: tuple[Searches, Cell]) -> tuple[int, bool]:
    """By tier, the small model's first, which take seconds."""
    searches, cell = pair
    return cell.tier, searches.study.model == ENCODER


def main(argv: Sequence[str] | None = None) -> int:
    given = parts_first(argv, PARTS)
    options, parser = parse(EvidenceOptions, "experiments.evidence", ABOUT, given, epilog="")
    console = Console()
    quiet_on_one_thread()
    with Ending(parser, console) as ending:
        run_parts(Command(options, console), PARTS, options.do)
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())
