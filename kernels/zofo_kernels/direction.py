"""The identity of a random direction: which noise, not how it is computed.

The value of element ``j`` of the ``i``-th zeroth-order parameter depends on
``(seed, step, sample, i, j)`` and on nothing else: not on the device, the dtype, the launch
shape, the sharding or the order of draws.  Recorded runs depend on this definition, so it is
versioned: any change to it must change :data:`NOISE_VERSION`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .distributions import DISTRIBUTIONS

NOISE_VERSION = 1
"""Version of the noise definition (hash, counter layout, transforms)."""

ROUNDING_ELEMENTS_PER_CALL = 8
"""Elements that get their 16 rounding bits from one Philox4x32-10 call."""
STREAM_DIRECTION = 0
STREAM_ROUNDING = 1

_MASK64 = (1 << 64) - 1
_FLOAT32_MAX = torch.finfo(torch.float32).max


def _mix64(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection on 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


class Direction(NamedTuple):
    """One random direction v over all zeroth-order parameters.

    Args:
        seed: the optimizer's seed, ``0 <= seed < 2**64``.
        step: the optimizer step t, ``0 <= step < 2**64``; or a 0-dim int64 tensor that holds it,
            which Triton's kernels read on its device when they run.
        sample: the index s of the direction within the step.
        distribution: ``"gaussian"``, N(0, 1) an element, or ``"rademacher"``, +1 or -1.
    """

    seed: int
    step: int | Tensor
    sample: int = 0
    distribution: str = "gaussian"

    def key(self) -> tuple[int, int]:
        """The 64-bit Philox key as two 32-bit words, low word first. Waits for a tensor step."""
        h = NOISE_VERSION
        for value in (self.seed, int(self.step), self.sample):
            h = _mix64(h ^ value)
        return h & 0xFFFFFFFF, h >> 32


class Shift(NamedTuple):
    """A displacement ``scale * direction`` that weights currently carry."""

    direction: Direction
    scale: float


def check_direction(direction: Direction) -> None:
    """Raise where a direction's fields are out of range.

    Raises:
        TypeError: a field is not an int, or ``direction`` is no :class:`Direction`.
        ValueError: a field is out of range, or the distribution is unknown.
    """
    if not isinstance(direction, Direction):
        raise TypeError(f"direction must be a zofo_kernels.Direction, got {direction!r}")
    for name in ("seed", "step", "sample"):
        value = getattr(direction, name)
        if name == "step" and isinstance(value, Tensor):
            if value.dtype != torch.int64 or value.dim() != 0:
                raise ValueError(
                    "step must be a 0-dim int64 tensor, or an int, got shape "
                    f"{tuple(value.shape)} of {value.dtype}"
                )
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if not 0 <= value <= _MASK64:
            raise ValueError(f"{name} must be in [0, 2**64), got {value}")
    if direction.distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution must be one of {DISTRIBUTIONS}, got {direction.distribution!r}"
        )


def check_shift(name: str, shift: Shift) -> None:
    """Raise where a shift cannot be used; ``name`` is the argument's.

    Raises:
        TypeError, ValueError: as :func:`check_direction` and :func:`check_finite`; or ``shift``
            is no :class:`Shift`.
    """
    if not isinstance(shift, Shift):
        raise TypeError(f"{name} must be a zofo_kernels.Shift, got {shift!r}")
    check_direction(shift.direction)
    check_finite(f"{name}.scale", shift.scale)


def check_finite(name: str, value: float) -> None:
    """Raise ValueError where ``value`` is not a number that is finite in float32."""
    if not isinstance(value, (int, float)) or not abs(value) <= _FLOAT32_MAX:
        raise ValueError(f"{name} must be a finite float32 number, got {value!r}")
