"""Many passes over the same weights, known in advance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from .direction import Direction, Shift


class Pass(NamedTuple):
    """Shifts in turn, each rounded to the weights' dtype, then an update where it has directions.

    Equal to ``perturb_`` for each shift and then ``update_``.
    """

    shifts: tuple[Shift, ...]
    directions: tuple[Direction, ...] = ()
    coefficients: tuple[float, ...] = ()
    """One a direction, as the kernels take them: in float32, or float64 for float64 weights."""
    lr: float = 0.0
    weight_decay: float = 0.0


class Passes(tuple[Pass, ...]):
    """Passes in order. ``cache`` is for what a backend makes of them, once."""

    cache: dict[Any, Any]

    def __new__(cls, passes: Iterable[Pass]) -> Passes:
        made = super().__new__(cls, passes)
        made.cache = {}
        return made
