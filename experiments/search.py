"""Searching a rate: on one grid and one seed, until the best one lies between others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from .report import Result

RATES = tuple(float(f"{digit}e{exponent}") for exponent in range(-7, 0) for digit in (1, 3))
"""Half a decade apart: the one grid that every rate is searched on."""
MOST_TRIED = 5
"""Rates of a search."""
SEARCHED = 0
"""The seed that rates are searched on."""


def seeds_of(wanted: Sequence[int]) -> list[int]:
    """Of the best rate's runs: the searched one, which has its run already, before others."""
    return [SEARCHED, *(seed for seed in wanted if seed != SEARCHED)]


def climb(start: float, found: Mapping[float, Result]) -> Iterator[float]:
    """Rates to try, from a start up or down the grid until the best one lies between others.

    Args:
        start: of :data:`RATES`.
        found: runs by rate, that of each rate yielded before the next one is asked for.

    Raises:
        ValueError: the start is not on the grid.
    """
    if start not in RATES:
        raise ValueError(f"start must be on the grid of rates, got {start:g}")
    yield start
    while len(found) < MOST_TRIED:
        best = RATES.index(best_of(found))
        untried = [
            RATES[at]
            for at in (best + 1, best - 1)
            if 0 <= at < len(RATES) and RATES[at] not in found
        ]
        if not untried:
            return
        yield untried[0]


def search(start: float, run: Callable[[float], Result]) -> dict[float, Result]:
    """Runs of the rates of :func:`climb`, in order of rates."""
    found: dict[float, Result] = {}
    for rate in climb(start, found):
        found[rate] = run(rate)
    return dict(sorted(found.items()))


def best_of(found: Mapping[float, Result]) -> float:
    """The rate whose run has the lowest development loss; of equal ones, the lowest rate."""
    return min(sorted(found), key=lambda rate: loss_of(found[rate]))


def is_at_an_end(found: Mapping[float, Result]) -> bool:
    """Whether a better rate may lie outside of those tried."""
    best = best_of(found)
    return best in (min(found), max(found))


def loss_of(run: Result) -> float:
    """The development loss of the best evaluation; infinite where it is no number."""
    loss = float(run["best"]["loss"])
    return math.inf if math.isnan(loss) else loss
