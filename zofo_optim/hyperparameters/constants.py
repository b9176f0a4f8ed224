"""The theorem's constants, as they are around the weights now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..evaluation import Closure
from ..groups_and_state import GroupsAndState
from ..smoothness import Smoothness, measure_smoothness
from ..theory import Constants
from .first_order import gradient_norms
from .zeroth_order import ZerothOrder

_SAID = {"zo": "x", "fo": "y"}


class Measured(NamedTuple):
    """Constants, and the smoothness that they are of."""

    constants: Constants
    smoothness: Smoothness
    doubts: tuple[str, ...]
    """What makes constants other than they should be, in words."""


def measure(
    optimizer: GroupsAndState,
    closures: Sequence[Closure],
    zeroth_order: ZerothOrder,
    *,
    components: int | None,
    floor: float,
    **options: Any,
) -> Measured:
    """Local estimates; all but ``d_x`` and ``n`` may be larger elsewhere on the sub-level set.

    L_x and L_y are the largest curvatures of the mean loss of all batches, L_x_max and L_y_max
    those of the worst of these, of each block: where x and y interact the theorem asks for more;
    sigma^2 is the unbiased variance of the batches' gradients, of
    zeroth-order ones by their slopes; G is the largest norm of a batch's gradient; gap is the mean
    loss less ``floor``. Where there is no first-order group, the constants of y are those of x.

    Args:
        optimizer: whose groups are x and y.
        closures: batches, the theorem's components, or some of them.
        zeroth_order: what was measured along random directions.
        components: how many there are in an epoch; None: as many as closures.
        floor: a lower bound of the loss, f*.
        **options: of :func:`zofo_optim.smoothness.measure_smoothness`.

    Raises:
        ValueError: the loss is not above ``floor``.
    """
    gap = zeroth_order.loss - floor
    if not 0 < gap < math.inf:
        raise ValueError(f"floor must be below the loss, {zeroth_order.loss:g}, got {floor!r}")
    whole = measure_smoothness(optimizer, list(closures), by="mode", **options)
    each = [measure_smoothness(optimizer, closure, by="mode", **options) for closure in closures]
    has_fo = "fo" in whole
    norms, mean = gradient_norms(optimizer, closures) if has_fo else ([0.0] * len(closures), 0.0)
    squares = [x**2 + y**2 for x, y in zip(zeroth_order.norms, norms, strict=True)]
    batches = len(closures)
    variance = 0.0
    if batches > 1:
        # E s s' over pairs has no own squares in it; the mean gradient's square has 1 / batches
        of_x = sum(x**2 for x in zeroth_order.norms) / batches - zeroth_order.mean_norm_squared
        of_y = (sum(y**2 for y in norms) / batches - mean**2) * batches / (batches - 1)
        variance = max(0.0, of_x) + max(0.0, of_y)
    L = {mode: whole[mode].smoothness for mode in whole}
    largest = {mode: max(L[mode], *(one[mode].smoothness for one in each)) for mode in whole}
    y = "fo" if has_fo else "zo"
    constants = Constants(
        L_x=L["zo"],
        L_y=L[y],
        L_x_max=largest["zo"],
        L_y_max=largest[y],
        sigma=math.sqrt(variance),
        G=math.sqrt(max(squares)),
        gap=gap,
        d_x=whole["zo"].parameters,
        n=batches if components is None else components,
    )
    doubts = []
    if components is None:
        doubts.append(
            f"n = {batches}, as many as closures were given; say components= for an epoch's steps"
        )
    if batches == 1:
        doubts.append("sigma = 0, as one batch says nothing of their noise; give more closures")
    if options.get("method") != "forward":
        missed = {mode: sum(one[mode].largest is None for one in (whole, *each)) for mode in whole}
        doubts += [
            f"L of {_SAID[mode]}: {count} of {1 + batches} largest eigenvalues were not found, and "
            "Frobenius norms, which are upper bounds, stand in their place"
            for mode, count in missed.items()
            if count
        ]
    return Measured(constants, whole, tuple(doubts))
