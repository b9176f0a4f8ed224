"""What the grids found: losses by rate, and the best rate."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from ..directions.grid import Cell
from ..presets import preset
from ..search import SEARCHED

RUNS = Path(__file__).parents[1] / "results" / "directions" / "runs.csv"
OTHERS = ("winogrande", "prefix")
"""A task and an adapter that the formula was not fitted to; their best rates had been seen."""


@dataclass(frozen=True)
class Searched:
    """A grid of one setting's rates."""

    losses: dict[float, float]
    """Development loss of the best evaluation, by rate; empty where a preset says the best rate."""
    best: float

    @property
    def is_at_an_end(self) -> bool:
        """Whether a better rate may lie outside of the grid."""
        return bool(self.losses) and self.best in (min(self.losses), max(self.losses))


def searched(model: str, cell: Cell, runs: Path = RUNS) -> Searched | None:
    """The grid of a cell; of an adapter alone without one, its preset; None: there is neither."""
    with runs.open(encoding="utf-8", newline="") as file:
        losses = {
            float(row["rate"]): float(row["dev_loss"])
            for row in csv.DictReader(file)
            if (row["model"], row["task"], row["method"], row["directions"], row["seed"])
            == (model, cell.task, cell.method, cell.kind, str(SEARCHED))
        }
    if losses:
        finite = {rate: loss if loss == loss else math.inf for rate, loss in losses.items()}
        return Searched(finite, min(finite, key=finite.__getitem__))
    if cell.rate == "lr_fo":
        return Searched({}, float(preset(f"gt-{model}", cell.method, cell.task)["lr_fo"]))
    return None


def is_other(cell: Cell) -> bool:
    return any(name in (cell.task, *cell.method.split("-")) for name in OTHERS)
