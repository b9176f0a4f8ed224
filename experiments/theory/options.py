"""The command line of the figures of theory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options import COUNT, INDEX, OUT, Range, check_ranges, option, some_of
from ..study_options import MODELS

FIGURES = ("example23", "fig2", "displacement", "fig1a", "fig1b", "scatter")
RANGES = {
    **{"seeds": INDEX, "vectors": Range(2)},
    **dict.fromkeys(("steps", "points", "batch_size", "train_size", "dev_size"), COUNT),
}


@dataclass
class TheoryOptions:
    """The command line of `theory`."""

    do: list[str] = option(list(FIGURES), some_of(FIGURES), choices=FIGURES, metavar="FIGURE")
    out: Path = option(Path("runs/theory"), OUT)
    models: list[str] = option([], MODELS)
    data: str | None = option(None, "folder with the tasks' data; default: ZOFO_DATA")
    seeds: list[int] = option([0, 1, 2], "of fig2 and scatter; the others take the first")
    steps: int | None = option(None, "of a run; default: as in studies.py")
    points: int | None = option(None, "of a run that are measured; default: as in studies.py")
    vectors: int | None = option(None, "random ones a measurement; default: as in studies.py")
    batch_size: int = option(8, "examples a step and a measurement")
    train_size: int = option(1000, "training examples, at most")
    dev_size: int = option(100, "development examples, at most")

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
