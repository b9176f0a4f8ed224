"""What kinds of directions are worth, alone and beside adapters: a grid of runs.

    python -m experiments.directions --model path/to/stories260k --out runs/directions
    python -m experiments.directions --do runs --share 1 2 ...    one of two processes
    python -m experiments.directions --do times ...               on a quiet machine
    python -m experiments.directions --do report

The grid is in grid.py: zeroth order alone along Gaussian, ±1 and rank-1 directions and with one
rank-1 direction for each example, plain and normalized; prompt, prefix and LoRA tuning, by first
order alone and beside a base that learns by one direction for each example; and full fine-tuning as
their bound. Every rate is searched on one seed, by the development loss.

`OUT/MODEL/` receives a folder for each run, as those of `finetune`, and `times-TASK.json`: seconds
of a step, measured in turn on the same batches. The report, `OUT/table.md`, `runs.csv`,
`curves.csv` and plots, is of all models there; it leaves out cells that are not finished.

Needs, in a checkout: pip install -e ".[experiments]"
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from zofo_optim.whole import write_json

from ..commands import RESUMES, ended, run_parts
from ..files import DataError
from ..finetune import Runs, machine, model_name, versions
from ..kept import finished
from ..models import DEFAULT_MODEL_PACKAGE
from ..options import OUT, OptionError, Options, option, parse
from ..settings import OF_ZEROTH_ORDER
from . import report
from .grid import STUDIES, cells, study_of
from .runs import Searches
from .timing import step_seconds

PARTS = ("runs", "times", "report")
ABOUT = (
    "Compare kinds of directions, alone and beside adapters, by a grid of runs whose tasks, kinds, "
    f"steps and rates are in grid.py. For the models {', '.join(study.model for study in STUDIES)}."
)
FIXED = (OF_ZEROTH_ORDER - {"mu"}) | {
    *("methods", "steps", "eval_every", "patience", "schedule", "optimizer", "lr_fo", "no_save")
}
"""Options that the grid sets."""


@dataclass
class DirectionsOptions(Options):
    """The command line of `directions`."""

    do: list[str] = option(
        list(PARTS), f"some of {', '.join(PARTS)}", choices=PARTS, metavar="PART"
    )
    share: list[int] = field(
        default_factory=lambda: [1, 1],
        metadata={"help": "two numbers: which share of the runs, of how many", "nargs": 2},
    )
    rounds: int = option(30, "of steps that are timed")
    seeds: list[int] = option([0, 1, 2], "of the best rate; rates are searched on 0")
    out: Path = option(Path("runs/directions"), OUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        which, count = self.share
        if not 1 <= which <= count:
            raise OptionError(f"--share must be a number and how many there are, got {self.share}")


class Command:
    """The parts of one command line."""

    def __init__(self, options: DirectionsOptions, console: Console) -> None:
        self._options, self._console = options, console
        options.no_save = True
        self._runs = Runs(options, console)
        self._name = model_name(options.model or DEFAULT_MODEL_PACKAGE)
        self._folder = options.out / self._name

    def runs(self) -> None:
        """The runs of our share."""
        searches = Searches(self._runs, self._folder, self._options.seeds)
        which, count = self._options.share
        for number, some in enumerate(cells(study_of(self._name))):
            if number % count == which - 1:
                for cell in some:
                    searches.results(cell)

    def times(self) -> None:
        """Seconds of steps, task by task."""
        study = study_of(self._name)
        for task in study.tasks:
            own = [cell for some in cells(study) for cell in some if cell.task == task]
            found = step_seconds(self._runs, own, self._options.rounds, self._console)
            write_json(
                self._folder / f"times-{task}.json",
                {"steps": found, "versions": versions(), "machine": machine(self._runs.device)},
            )

    def report(self) -> None:
        """Tables and plots of all models that have runs."""
        report.render(self._options.out, _found(self._options.out, self._options.seeds))


def _found(out: Path, seeds: list[int]) -> dict[str, list[report.Found]]:
    """Finished cells by model and task."""
    studies: dict[str, list[report.Found]] = {}
    if not out.is_dir():
        raise DataError(f"--out must be a folder with runs, got {str(out)!r}, which is none")
    for folder in sorted(part for part in out.iterdir() if part.is_dir()):
        study = next((s for s in STUDIES if s.model in folder.name.lower()), None)
        if study is None:
            continue
        searches = Searches(None, folder, seeds)
        done = finished(searches.results, (cell for some in cells(study) for cell in some))
        for task in study.tasks:
            own = [cell for cell in done if cell.task == task]
            times: dict[str, Any] = {"steps": {}}
            file = folder / f"times-{task}.json"
            if file.is_file():
                times = json.loads(file.read_text(encoding="utf-8"))
            if own:
                one = report.Found(
                    task,
                    own,
                    {cell: searches.searched(cell) for cell in own},
                    {cell: done[cell] for cell in own},
                    times["steps"],
                )
                studies.setdefault(folder.name, []).append(one)
    return studies


def main(argv: Sequence[str] | None = None) -> int:
    options, parser = parse(DirectionsOptions, "experiments.directions", ABOUT, argv, fixed=FIXED)
    console = Console()

    def run() -> None:
        run_parts(Command(options, console), PARTS, options.do)

    return ended(parser, console, run, f"Runs, times and tables: {options.out}", RESUMES)


if __name__ == "__main__":
    raise SystemExit(main())
