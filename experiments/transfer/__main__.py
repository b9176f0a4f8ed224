"""Adapters of small models in a large one that is never differentiated: what they are worth.

    ZOFO_DATA=path/with/all python -m experiments.transfer --out runs/transfer
    python -m experiments.transfer runs --minutes 50    what has begun by then
    python -m experiments.transfer variants             layer maps, projections and scales
    python -m experiments.transfer costs                memory of the large model
    python -m experiments.transfer report

Jin, Zhang, Zong (EMNLP 2023) train an adapter on a small model, or on a bridge model, a pruned
slice of the large one, and plug it into the large one. MiniLM (6 layers) and stories260k (5) are
the large models here, slices of 3 and 2 layers the small ones; SST-2 and WiC. Beside them: no
adapter, a probe, LoRA by gradients on the large model, zeroth order alone, and zeroth order after
the transfer. The grid is in grid.py. Whatever touches the large model, but for LoRA by gradients,
runs where a tensor saved for a backward is an error (guard.py).

`OUT/MODEL/TASK/METHOD/RATE/seed-N.json` is a run, with the small model's adapter beside it; one
that is there is not made again. `OUT/MODEL/TASK/variants/` holds other ways to carry the adapters
of seed 0 over, `OUT/MODEL/TASK/costs.json` memory. The report, `OUT/table.md` and `table.json`,
leaves out methods that are not finished.

Needs, in a checkout: pip install -e ".[experiments]"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..commands import Deadline, check_runs, data_folder, parts_first, run_study
from ..options import OUT, option, parse, some_of
from ..partition.problems import default_models
from ..study_options import DEV, TEST, StudyOptions
from . import costs, report, variants
from .grid import STUDIES, cells, study_of
from .runs import FIRST_HEADS, Searches

PARTS = ("runs", "variants", "costs", "report")
ABOUT = "Compare adapters of small models, carried over, with what trains the large model."
NAMES = list(dict.fromkeys(cell.name for study in STUDIES for cell in cells(study)))


@dataclass
class TransferOptions(StudyOptions):
    """The command line of `transfer`."""

    do: list[str] = option(list(PARTS), some_of(PARTS), choices=PARTS, metavar="PART")
    tasks: list[str] = option(list(FIRST_HEADS), "of the models' own", choices=list(FIRST_HEADS))
    methods: list[str] = option([], f"some of {', '.join(NAMES)}; default: all", choices=NAMES)
    dev_size: int = option(200, DEV)
    test_size: int = option(1000, TEST)
    out: Path = option(Path("runs/transfer"), OUT)


class Command:
    """The parts of one command line."""

    def __init__(self, options: TransferOptions, console: Console) -> None:
        self._options, self._console = options, console
        self._models = options.models or default_models()

    def _searches(self, made: bool) -> list[Searches]:
        """Of every model and task, the first tasks of all models first."""
        given = self._options
        data = data_folder(given.data) if made else None
        found = [
            Searches(
                study_of(model),
                task,
                model,
                given.out,
                given.seeds,
                data=data,
                sizes=given.sizes,
                console=self._console,
            )
            for model in self._models
            for task in study_of(model).tasks
            if task in given.tasks
        ]
        return sorted(found, key=lambda one: one.study.tasks.index(one.task))

    def runs(self) -> None:
        """All that are not there, those that tell most first."""
        asked, deadline = self._options.methods, Deadline(self._options.minutes, self._console)
        for searches in self._searches(made=True):
            for cell in cells(searches.study):
                if asked and cell.name not in asked:
                    continue
                if deadline.is_over(f"{searches.name}, {searches.task}: {cell.name}"):
                    return
                searches.results(cell)

    def variants(self) -> None:
        """Other ways to carry the adapters of the first seed over."""
        for searches in self._searches(made=True):
            variants.make(searches, self._console)

    def costs(self) -> None:
        """Memory of the large model."""
        for searches in self._searches(made=True):
            costs.measure(searches, self._console)

    def report(self) -> None:
        """Tables of all that is finished."""
        out = self._options.out
        check_runs(out)
        report.render(out, self._searches(made=False))


def main(argv: Sequence[str] | None = None) -> int:
    given = parts_first(argv, PARTS)
    options, parser = parse(TransferOptions, "experiments.transfer", ABOUT, given, epilog="")
    return run_study(Command, options, parser, PARTS)


if __name__ == "__main__":
    raise SystemExit(main())
