"""Where hybrids are best: by how much of something there is to spend, by more than chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Point:
    """What a method takes and reaches.

    Attributes:
        name: of the method.
        hybrid: whether it has both orders.
        spent: what is limited, such as bytes or seconds.
        losses: one a seed; the lower the better. For accuracies, errors.
        error: standard error of each loss that other causes give, such as few test examples.
    """

    name: str
    hybrid: bool
    spent: float
    losses: tuple[float, ...]
    error: float = 0.0

    @property
    def mean(self) -> float:
        """Over seeds; infinite where a run diverged."""
        found = statistics.fmean(self.losses)
        return math.inf if math.isnan(found) else found

    @property
    def spread(self) -> float:
        """How far chance moves the mean: the deviation over seeds, or the error: the larger."""
        several = len(self.losses) > 1 and all(map(math.isfinite, self.losses))
        return max(self.error, statistics.stdev(self.losses) if several else 0.0)


WINS, LOSES, TIES, ALONE = "hybrid", "other", "tie", "hybrid alone"


class Region(NamedTuple):
    """From one amount to the next: what is best there of hybrids and of the rest.

    Attributes:
        least, below: the amounts.
        verdict: WINS or LOSES: by more than the larger spread of both; TIES; ALONE: nothing else
            takes so little.
        hybrid, other: the best ones; None where none takes so little.
    """

    least: float
    below: float
    verdict: str
    hybrid: Point | None
    other: Point | None


def regions(points: Sequence[Point]) -> list[Region]:
    """In order of amounts, from the smallest that is enough for anything."""
    found: list[Region] = []
    amounts = sorted({point.spent for point in points})
    for place, amount in enumerate(amounts):
        below = amounts[place + 1] if place + 1 < len(amounts) else math.inf
        affordable = [point for point in points if point.spent <= amount]
        hybrid, other = (
            min(
                (p for p in affordable if p.hybrid == which),
                key=lambda p: (p.mean, p.spent),
                default=None,
            )
            for which in (True, False)
        )
        region = Region(amount, below, verdict(hybrid, other), hybrid, other)
        before = found[-1] if found else None
        if before is not None and before[2:] == region[2:]:
            found[-1] = before._replace(below=below)
        else:
            found.append(region)
    return found


def verdict(hybrid: Point | None, other: Point | None) -> str:
    """
    Raises:
        ValueError: there is neither.
    """
    if hybrid is None or other is None:
        if hybrid is None and other is None:
            raise ValueError("hybrid or other must be there, got neither")
        return LOSES if hybrid is None else ALONE
    gain = other.mean - hybrid.mean
    spread = max(hybrid.spread, other.spread)
    if math.isnan(gain) or abs(gain) <= spread:
        return TIES
    return WINS if gain > 0 else LOSES
