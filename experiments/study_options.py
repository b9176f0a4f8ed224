"""What the command lines of several studies have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .options import COUNT, INDEX, OUT, POSITIVE, check_ranges, option
from .partition.problems import Sizes

MODELS = "hub ids or folders; default: MiniLM, and models/stories260k in ZOFO_DATA"
DEV = "examples to choose rates and weights by, at most"
TEST = "examples of the final scores, at most"
RANGES = {
    **{"minutes": POSITIVE},
    **dict.fromkeys(("train_size", "dev_size", "test_size"), COUNT),
}


@dataclass
class SearchOptions:
    """Of commands that search rates on one seed, and run the best one on others."""

    # each command has its own; here, so that help begins with it
    do: list[str] = option([], "parts of the command")
    data: str | None = option(None, "folder with the tasks' data; default: ZOFO_DATA")
    seeds: list[int] = option([0, 1, 2], "of the best rate; rates are searched on 0")
    out: Path = option(Path("runs"), OUT)

    def __post_init__(self) -> None:
        check_ranges(self, {"seeds": INDEX})


@dataclass
class StudyOptions(SearchOptions):
    """Of commands that do so for several models, by numbers of examples."""

    models: list[str] = option([], MODELS)
    minutes: float | None = option(
        None, "nothing of the grid begins after so many; default: all does"
    )
    train_size: int = option(Sizes.train, "training examples, at most")
    dev_size: int = option(Sizes.dev, DEV)
    test_size: int = option(Sizes.test, TEST)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, RANGES)

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.train_size, self.dev_size, self.test_size)
