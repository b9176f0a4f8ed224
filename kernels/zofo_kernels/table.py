"""What one pass over the weights works on: contiguous tensors with their place in the noise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor


class Slot(NamedTuple):
    """A contiguous, non-empty tensor and the noise that belongs to it.

    ``parameter`` is the parameter's index among the zeroth-order parameters, ``offset`` the index
    of the tensor's first element in the full, unsharded, row-major parameter.
    """

    tensor: Tensor
    parameter: int
    offset: int


class Slots(tuple[Slot, ...]):
    """Slots on one device. ``cache`` is for what a backend makes of their addresses, once."""

    cache: dict[str, Any]

    def __new__(cls, slots: Iterable[Slot]) -> Slots:
        made = super().__new__(cls, slots)
        made.cache = {}
        return made
