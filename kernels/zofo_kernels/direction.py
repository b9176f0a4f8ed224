"""The identity of a random direction: which noise, not how it is computed.

The value of element ``j`` of the ``i``-th zeroth-order parameter depends on
``(seed, step, sample, i, j)`` and on nothing else: not on the device, the dtype, the launch
shape, the sharding or the order of draws.  (Where a direction has low rank, what depends on these
are the factors of its matrices: see ``structure.py``.)  Recorded runs depend on this definition,
and on how shifts along a direction round, so it is versioned: a direction carries its version, and
all versions stay implemented.

Version 2 has the noise of version 1, and rounds shifts of coarse weights stochastically.  A weight
of a 16-bit dtype is coarse where its dtype's numbers are spaced wider around it than
:attr:`Distribution.finest` times the size of the shift's scale: rounded to nearest, most of its
displacements would be lost, and estimates biased towards 0 (layer norms around 1 are an example:
bfloat16's numbers are 2^-7 apart there).  Where that would give infinity, and rounding to nearest
would not, the latter is done.  Shifts of opposite sign use complementary bits, so that
weights come back, and go equally far to either side.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .distributions import BY_NAME, DISTRIBUTIONS

NOISE_VERSION = 2
"""Version of the noise definition (hash, counter layout, transforms, rounding of shifts)."""
NOISE_VERSIONS = (1, 2)
"""All that are implemented."""
LARGEST_RANK = 1 << 16
KEY_VERSION = 1
"""What the hash of a key begins with; these versions draw the same noise."""

ROUNDING_ELEMENTS_PER_CALL = 8
"""Elements that get their 16 rounding bits from one Philox4x32-10 call."""
STREAM_DIRECTION = 0
STREAM_ROUNDING = 1
STREAM_SHIFT = 2
"""Of the rounding bits of shifts; those of updates are ``STREAM_ROUNDING``."""

_MASK64 = (1 << 64) - 1
_FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10}
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
        version: of the noise definition; default :data:`NOISE_VERSION`.
        rank: of each matrix's part of it, or 0, full noise; see ``structure.py``. Versions from 2
            on have low rank.
    """

    seed: int
    step: int | Tensor
    sample: int = 0
    distribution: str = "gaussian"
    version: int = NOISE_VERSION
    rank: int = 0

    def key(self) -> tuple[int, int]:
        """The 64-bit Philox key as two 32-bit words, low word first. Waits for a tensor step."""
        h = KEY_VERSION
        for value in (self.seed, int(self.step), self.sample):
            h = _mix64(h ^ value)
        return h & 0xFFFFFFFF, h >> 32


class Shift(NamedTuple):
    """A displacement ``scale * direction``: one that weights carry, or one to give them."""

    direction: Direction
    scale: float
    back: bool = False
    """Whether it takes off what another one gave, which tells how coarse weights round."""

    def taken_off(self) -> Shift:
        """The way back."""
        return Shift(self.direction, -self.scale, back=True)

    def coarse_from(self, dtype: torch.dtype) -> float:
        """Size from which on weights are coarse, a power of 2 or 0; infinite where none are."""
        if self.direction.version == 1 or dtype not in _FRACTION_BITS or not self.scale:
            return math.inf
        finest = BY_NAME[self.direction.distribution].finest * abs(self.scale)
        _, exponent = math.frexp(finest)  # 2^exponent is the smallest power of 2 above it
        size = math.ldexp(1.0, exponent + _FRACTION_BITS[dtype])
        # subnormal numbers are spaced as the smallest normal ones
        return 0.0 if size <= torch.finfo(dtype).tiny else min(size, math.inf)


def check_direction(direction: Direction) -> None:
    """Raise where a direction's fields are out of range.

    Raises:
        TypeError: a field is not an int, or ``direction`` is no :class:`Direction`.
        ValueError: a field is out of range, or the distribution is unknown.
    """
    if not isinstance(direction, Direction):
        raise TypeError(f"direction must be a zofo_kernels.Direction, got {direction!r}")
    for name in ("seed", "step", "sample", "rank"):
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
    if type(direction.version) is not int or direction.version not in NOISE_VERSIONS:
        raise ValueError(f"version must be one of {NOISE_VERSIONS}, got {direction.version!r}")
    if direction.rank > LARGEST_RANK or (direction.rank and direction.version == 1):
        raise ValueError(
            f"rank must be in [0, {LARGEST_RANK}], and 0 where version is 1, got "
            f"{direction.rank} in version {direction.version}"
        )
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
