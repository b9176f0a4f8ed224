"""Quantised bases: whether their scales learn, beside the run in 16 bits.

    ZOFO_DATA=path/with/sst2 python -m experiments.quantized --out runs/quantized
    python -m experiments.quantized runs --minutes 50   what has begun by then
    python -m experiments.quantized report

MiniLM and stories260k on SST-2, in bf16, int8 and int4 of torchao, int8 and nf4 of bitsandbytes:
zeroth order alone, LoRA on the frozen base, and both. The grid is in grid.py.

`OUT/MODEL/CELL/RATE/seed-N.json` is a run; one that is there is not made again. The report,
`OUT/table.md` and `table.json`, leaves out what is not finished.

Needs, in a checkout: pip install -e ".[experiments,quantized]"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..commands import Deadline, check_runs, data_folder, parts_first, run_study
from ..options import OUT, option, parse, some_of
from ..partition.problems import default_models
from ..study_options import StudyOptions
from . import report
from .grid import cells, study_of
from .runs import Searches

PARTS = ("runs", "report")
ABOUT = "Compare quantised bases, whose scales learn, with the run in 16 bits."
NAMES = [cell.name for cell in cells()]


@dataclass
class QuantizedOptions(StudyOptions):
    """The command line of `quantized`."""

    do: list[str] = option(list(PARTS), some_of(PARTS), choices=PARTS, metavar="PART")
    cells: list[str] = option([], f"some of {'; '.join(NAMES)}; default: all", choices=NAMES)
    out: Path = option(Path("runs/quantized"), OUT)


class Command:
    """The parts of one command line."""

    def __init__(self, options: QuantizedOptions, console: Console) -> None:
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
                console=self._console,
            )
            for model in self._models
        ]

    def runs(self) -> None:
        """All that are not there, those that tell most first."""
        asked, deadline = self._options.cells, Deadline(self._options.minutes, self._console)
        every = self._searches(made=True)
        for cell in cells():
            for searches in every:
                if asked and cell.name not in asked:
                    continue
                if deadline.is_over(f"{searches.name}: {cell.name}"):
                    return
                searches.results(cell)

    def report(self) -> None:
        """Tables of all that is finished."""
        out = self._options.out
        check_runs(out)
        report.render(out, self._searches(made=False))


def main(argv: Sequence[str] | None = None) -> int:
    given = parts_first(argv, PARTS)
    options, parser = parse(QuantizedOptions, "experiments.quantized", ABOUT, given, epilog="")
    return run_study(Command, options, parser, PARTS)


if __name__ == "__main__":
    raise SystemExit(main())
