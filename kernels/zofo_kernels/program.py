"""Many passes over the same weights, known in advance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from .direction import Direction, Shift, check_direction, check_finite, check_shift


@dataclass(frozen=True)
class Pass:
    """Shifts in turn, each rounded to the weights' dtype, then an update where it has directions.

    Equal to ``perturb_`` for each shift and then ``update_``. Coefficients and learning rate need
    not be finite: what a run did is done again as it was. Steps are numbers: those in tensors may
    change, and backends keep what they make of a program.

    Raises:
        TypeError, ValueError: a field that cannot be used.
    """

    shifts: tuple[Shift, ...]
    directions: tuple[Direction, ...] = ()
    coefficients: tuple[float, ...] = ()
    """One a direction; kernels take them in float32, or in float64 for float64 weights."""
    lr: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("shifts", "directions", "coefficients"):
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(f"{name} must be a tuple, got {getattr(self, name)!r}")
        for shift in self.shifts:
            check_shift("shifts", shift)
        for direction in self.directions:
            check_direction(direction)
        for direction in (*(shift.direction for shift in self.shifts), *self.directions):
            if isinstance(direction.step, Tensor):
                raise TypeError(
                    "step must be an int in a Pass, which does not change, got the tensor "
                    f"{direction.step!r}"
                )
        if len(self.directions) != len(self.coefficients):
            raise ValueError(
                f"coefficients must be as many as directions ({len(self.directions)}), got "
                f"{len(self.coefficients)}"
            )
        for name, value in (("lr", self.lr), *(("coefficients", c) for c in self.coefficients)):
            if not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be numbers, got {value!r}")
        check_finite("weight_decay", self.weight_decay)


@dataclass(frozen=True, eq=False)
class Program:
    """Passes in order. Backends keep what they make of it: use one object again.

    Raises:
        TypeError: something else than a :class:`Pass` is among them.
    """

    passes: tuple[Pass, ...]

    def __init__(self, passes: Iterable[Pass]) -> None:
        object.__setattr__(self, "passes", tuple(passes))
        for one in self.passes:
            if not isinstance(one, Pass):
                raise TypeError(f"passes must hold zofo_kernels.Pass, got {one!r}")
