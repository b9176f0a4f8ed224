"""The distributions of a direction's elements: one table, which every backend reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Distribution:
    """A distribution with mean 0 and variance 1, and how Philox's bits make an element of it."""

    name: str
    """What users call it."""
    code: int
    """What compiled kernels call it: at least 0. Kernels on disk hold it, so it never changes."""
    elements_per_call: int
    """Elements that one Philox4x32-10 call makes from its 128 bits."""
    finest: float
    """Weights spaced wider than this times a shift's scale are coarse: see ``direction.py``.

    Normal displacements are dither enough for rounding to nearest while the spacing is at most the
    scale (bias below 1e-8); of +1 and -1, all of one size, half of it leaves at most a quarter."""


GAUSSIAN = Distribution("gaussian", code=0, elements_per_call=8, finest=1.0)
"""N(0, 1) by Box-Muller, two elements a 32-bit word; |z| < 5.8."""
RADEMACHER = Distribution("rademacher", code=1, elements_per_call=128, finest=0.5)
"""+1 or -1 with equal probability, an element a bit; the same bits on every backend."""

BY_NAME: Mapping[str, Distribution] = MappingProxyType({d.name: d for d in (GAUSSIAN, RADEMACHER)})

DISTRIBUTIONS = tuple(BY_NAME)
"""The names."""
