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

from ..commands import (
    Deadline,
    check_runs,
    data_folder,
    ended,
    parts_first,
    quiet_on_one_thread,
    run_parts,
)
from ..options import COUNT, INDEX, OUT, POSITIVE, check_ranges, option, parse
from ..partition.problems import Sizes, default_models
from . import report
from .grid import cells, study_of
from .runs import Searches

PARTS = ("runs", "report")
ABOUT = "Compare quantised bases, whose scales learn, with the run in 16 bits."
NAMES = [cell.name for cell in cells()]
RANGES = {
    **{"seeds": INDEX, "minutes": POSITIVE},
    **dict.fromkeys(("train_size", "dev_size", "test_size"), COUNT),
}


@dataclass
class QuantizedOptions:
    """The command line of `quantized`."""

    do: list[str] = option(
        list(PARTS),
        f"some of {', '.join(PARTS)}; also as first words of the command line",
        choices=PARTS,
        metavar="PART",
    )
    models: list[str] = option(
        [], "hub ids or folders; default: MiniLM, and models/stories260k in ZOFO_DATA"
    )
    cells: list[str] = option([], f"some of {'; '.join(NAMES)}; default: all", choices=NAMES)
    data: str | None = option(None, "folder with the task's data; default: ZOFO_DATA")
    seeds: list[int] = option([0, 1, 2], "of the best rate; rates are searched on 0")
    minutes: float | None = option(None, "no cell begins after so many; default: all do")
    train_size: int = option(1000, "training examples, at most")
    dev_size: int = option(150, "examples to choose rates and weights by, at most")
    test_size: int = option(500, "examples of the final scores, at most")
    out: Path = option(Path("runs/quantized"), OUT)

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)


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
                sizes=Sizes(given.train_size, given.dev_size, given.test_size),
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
    console = Console()
    quiet_on_one_thread()

    def run() -> None:
        run_parts(Command(options, console), PARTS, options.do)

    return ended(parser, console, run, f"Runs and tables: {options.out}")


if __name__ == "__main__":
    raise SystemExit(main())
