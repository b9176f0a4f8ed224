"""What the losses of a range test say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Values: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"

_RISE = 0.1
"""A rise counts where it is more than this share of the fall before it."""
_WINDOW = 12
"""Steps over this are what losses are smoothed over, on either side."""
_SEEN = 4.0
"""A fall counts where it is so many times the median distance from the smoothed losses."""


@dataclass(frozen=True)
class RangeTest:
    """One sweep. Entry i is of the weights before step i, which has rate ``rates[i]``."""

    rates: tuple[float, ...]
    """Those that were reached; geometric."""
    losses: tuple[float, ...]
    """Mean loss at the start, and that of the step's batch since then; the last may be infinite."""
    smoothed: tuple[float, ...]
    """Straight lines fitted around each."""
    lowest: float | None
    """Rate at the lowest smoothed loss, before it first rises; None: it did not fall visibly."""
    lr: float | None
    """The suggestion: where the smoothed loss falls fastest, step by step, before ``lowest``."""
    diverged: float | None
    """Rate at which the sweep ended early, as the loss was too high."""


def outcome(
    rates: Sequence[float], losses: Sequence[float], early_stop: float, steps: int
) -> RangeTest:
    """What a sweep's losses say; pure."""
    end = len(losses)
    too_high = is_too_high(losses[-1], losses[0], early_stop)
    seen = np.array(losses[: end - too_high])
    smooth, slopes = lines(seen, max(2, steps // _WINDOW))
    lowest = lr = None
    if len(seen):
        noise = float(np.median(np.abs(seen - smooth)))
        best = int(np.argmin(smooth[: _first_rise(smooth, _SEEN * noise)]))
        if smooth[0] - smooth[best] > _SEEN * noise and smooth[best] < smooth[0]:
            lowest = rates[best]
            lr = rates[int(np.argmin(slopes[: best + 1]))]
    return RangeTest(
        tuple(rates[:end]),
        tuple(losses),
        tuple(smooth.tolist()),
        lowest,
        lr,
        rates[end - 1] if too_high else None,
    )


def _first_rise(smooth: Values, visible: float) -> int:
    """Where the losses first rise visibly, by more than a tenth of their fall so far; or the end.

    What falls again after it does so at rates that have thrown the weights elsewhere.
    """
    lowest = np.minimum.accumulate(smooth)
    rises = smooth - lowest > np.maximum(visible, _RISE * (smooth[0] - lowest))
    return int(np.argmax(rises)) if rises.any() else len(smooth)


def lines(values: Values, width: int) -> tuple[Values, Values]:
    """Value and slope at each place of the straight line through ``width`` values on each side."""
    places = np.arange(len(values), dtype=float)
    smooth, slopes = np.array(values, dtype=float), np.zeros(len(values))
    for place in range(len(values)):
        near = slice(max(0, place - width), place + width + 1)
        if len(places[near]) > 2:
            slopes[place], start = np.polyfit(places[near], values[near], 1)
            smooth[place] = start + slopes[place] * place
    return smooth, slopes


def is_too_high(loss: float, start: float, early_stop: float) -> bool:
    return not loss <= start + (early_stop - 1) * abs(start)
