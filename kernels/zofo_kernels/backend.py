"""What a backend provides, and what backends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .direction import Direction, Shift
from .memo import kept
from .program import Program
from .region import Region
from .structure import FactorJob


class Backend(Protocol):
    """A module that works on regions: ``reference``, ``cpu`` or ``triton``.

    Regions are on one device, and no two of them share memory. Tables of a :class:`Regions`
    are made once, those of another sequence in each call. Tensors among the arguments are on
    the same device; whoever calls has checked all arguments, and turned gradients off.

    Arithmetic is float32, and float64 for float64 weights. What becomes of an element depends on
    nothing but its own value and its place in the noise: not on regions, launches or threads.
    RN rounds to nearest, ties to even, in the weight's dtype.
    """

    __name__: str
    """Of the module; it ends with the name that users give."""

    def perturb(self, regions: Sequence[Region], shifts: Sequence[Shift]) -> None:
        """w <- RN(w + scale z) for each shift in turn, in place."""

    def perturb_copy(
        self, regions: Sequence[Region], sources: Sequence[Tensor], shift: Shift
    ) -> None:
        """Regions <- RN(source + scale z).

        Args:
            regions: what is written; what they held before does not matter.
            sources: one a region: contiguous, of the same shape and dtype, in other memory.
            shift: the displacement.
        """

    def update(
        self,
        regions: Sequence[Region],
        directions: Sequence[Direction],
        coefficients: Tensor,
        lr: Tensor,
        weight_decay: float,
        recover: Shift | None,
        stochastic: bool,
    ) -> None:
        """w <- round(w0 - (sum_s (lr c_s) z_s + (lr weight_decay) w0)), in place.

        A z of low rank is a sum of terms: see ``structure.py``.

        w0 = RN(w - recover.scale z'), or w where nothing is to be recovered. The order of the
        roundings is part of the definition: the products lr c_s and lr weight_decay in the
        compute dtype, the sum over s from the left, then the decay, then the subtraction. Where
        weight_decay or lr weight_decay is 0, the term with w0 is left out.

        Coefficients and rate stay tensors, since the host must not wait for them; so an update
        is no :class:`Program` of one pass, which holds numbers.

        Args:
            regions: the weights.
            directions: S of them, at least one.
            coefficients: floating, shape (S,).
            lr: real, 0-dim.
            weight_decay: a number.
            recover: the shift that the weights carry.
            stochastic: round bfloat16 and float16 stochastically, with the rounding bits of
                ``directions[0]``; otherwise, and for other dtypes, ``round`` is RN.
        """

    def replay(self, regions: Sequence[Region], program: Program, stochastic: bool) -> None:
        """All passes of the program: to the bit what ``perturb`` and ``update`` give in turn."""

    def fill_noise(self, out: Region, direction: Direction) -> None:
        """out <- z, rounded to the dtype; what it held does not matter.

        Full noise is made in float32, also where the dtype is float64."""

    def factors(
        self, jobs: Sequence[FactorJob], directions: Sequence[Direction], device: torch.device
    ) -> Tensor:
        """Factors of directions of one rank r >= 1: float32, shape (directions, r, rows).

        Rows are those of all jobs in turn; U and V are transposed, so that a column is contiguous.
        """


def replay_in_turn(
    perturb: Callable[[Sequence[Region], Sequence[Shift]], None],
    update: Callable[
        [Sequence[Region], Sequence[Direction], Tensor, Tensor, float, Shift | None, bool], None
    ],
    regions: Sequence[Region],
    program: Program,
    stochastic: bool,
) -> None:
    """:meth:`Backend.replay` by the backend's own ``perturb`` and ``update``."""
    numbers, at = _numbers(program, regions[0].tensor.device), 0
    for one in program.passes:
        for shift in one.shifts:
            perturb(regions, [shift])
        last = at + 1 + len(one.directions)
        if one.directions:
            coefficients, lr = numbers[at + 1 : last], numbers[at]
            update(regions, one.directions, coefficients, lr, one.weight_decay, None, stochastic)
        at = last


@kept
def _numbers(program: Program, device: torch.device) -> Tensor:
    """Each pass's learning rate and then its coefficients, on the device."""
    numbers = [x for one in program.passes for x in (one.lr, *one.coefficients)]
    return torch.tensor(numbers, dtype=widest_float(device), device="cpu").to(device)


def widest_float(device: torch.device) -> torch.dtype:
    """float64, but float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
