"""Drawing docs/evidence.md: the text of page.txt, its tables from committed results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import others, paper, pictures, sentences, seven, tables
from .found import Found, read
from .runs import RESULTS

TEMPLATE = Path(__file__).with_name("page.txt")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
PICTURES = RESULTS / "evidence"
PLACE = re.compile(r"\{\{([a-z0-9-]+)\}\}")
NOTE = "<!-- Drawn by python -m experiments.evidence from experiments/evidence/page.txt. -->\n"


@dataclass(frozen=True)
class Evidence:
    """What is found of the grid, and of the seven methods at their own protocol."""

    grid: Sequence[Found]
    seven: Sequence[Found]

    @property
    def both(self) -> list[Found]:
        return [*self.grid, *self.seven]


PARTS: Mapping[str, Callable[[Evidence], str]] = {
    "summary": lambda all_: sentences.summary(all_.both),
    "unfinished": lambda all_: sentences.unfinished(all_.grid),
    "memory-of-zeroth-order": lambda all_: sentences.memory_of_zeroth_order(all_.grid),
    "memory-of-lora": lambda all_: sentences.memory_of_lora(all_.both),
    "directions": lambda all_: sentences.directions(all_.both),
    "time-of-steps": lambda all_: sentences.time_of_steps(all_.grid),
    "protocol": lambda all_: sentences.protocol(all_.grid),
    "winners-by-steps": lambda all_: tables.winners_by_steps(all_.both),
    "winners-by-time": lambda all_: tables.winners_by_time(all_.both),
    "winners-by-memory": lambda all_: tables.winners_by_memory(all_.both),
    "grid-steps": lambda all_: tables.by_task(all_.grid, tables.test_losses),
    "seven-steps": lambda all_: tables.by_task(all_.seven, tables.test_losses),
    "accuracies": lambda all_: tables.accuracies(all_.both),
    "grid-time": lambda all_: tables.equal_time(all_.grid),
    "seven-time": lambda all_: tables.equal_time(all_.seven),
    "costs": lambda all_: tables.costs(all_.grid),
    "grid-gains": lambda all_: tables.gains(all_.grid),
    "seven-gains": lambda all_: tables.gains(all_.seven),
    "rates": lambda all_: tables.rates(all_.grid),
    "paper": lambda all_: paper.table(),
    "ours": lambda all_: paper.ours(),
    "others": lambda all_: others.table(),
}
"""What stands for ``{{name}}`` in the template, of all that is found. A section on other results,
such as those of experiments/results/quantized, is a function here and a place in page.txt."""


def text(found: Evidence, template: str | None = None) -> str:
    """The whole page.

    Raises:
        ValueError: the template has a place that no part is of.
    """
    whole = TEMPLATE.read_text(encoding="utf-8") if template is None else template
    unknown = sorted(set(PLACE.findall(whole)) - set(PARTS))
    if unknown:
        raise ValueError(f"places must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return NOTE + PLACE.sub(lambda place: PARTS[place[1]](found).rstrip("\n"), whole)


def draw() -> None:
    """The page, and its pictures beside the results."""
    found = committed()
    PAGE.write_text(text(found), encoding="utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, own in (("grid", found.grid), ("seven", found.seven)):
        if any(one.timed for one in own):
            pictures.over_time(PICTURES / f"time-{name}.png", own)
    pictures.over_memory(PICTURES / "memory.png", found.seven)


def committed() -> Evidence:
    """All results that are there."""
    return Evidence(read(), seven.read())
