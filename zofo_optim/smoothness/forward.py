"""Slopes and curvatures along random directions, from losses alone: no backward, no gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ..buffers import Buffers
from ..estimators import Point
from ..evaluation import Closure
from ..groups_and_state import GroupsAndState
from ..probing import losses_along


class Along(NamedTuple):
    """See :func:`along_directions`."""

    loss: Tensor
    """At the weights, float64: a scalar, or the losses of B examples."""
    slopes: Tensor
    """[f(x + mu v) - f(x - mu v)] / (2 mu), the gradient along v: shape (directions,), or
    (directions, B); float64."""
    curvatures: Tensor
    """[f(x + mu v) - 2 f(x) + f(x - mu v)] / mu^2, v' H v, likewise."""


def along_directions(
    optimizer: GroupsAndState,
    closure: Closure,
    *,
    directions: int = 16,
    seed: int = 0,
    mu: float | None = None,
) -> Along:
    """The loss, its slopes and its curvatures along directions as the optimizer draws them.

    For directions v with E[v v'] = I, a Gaussian's or of signs or low rank, E[slope^2] is
    ||grad f||^2 and E[curvature] is tr H, the trace of the Hessian with regard to what moves. What
    a zeroth-order step along one direction does to the loss in expectation is
    -lr E[slope^2] + lr^2 E[slope^2 curvature] / 2.

    The errors of both are O(mu^2). Rounding of the loss adds about 1e-7 |f| / mu to a slope and
    4e-7 |f| / mu^2 to a curvature where the loss is float32.

    Takes 1 + 2 directions evaluations and some 10 to 25 that verify, each of the whole batch; no
    weight, no buffer and nothing of the optimizer or of the global generators changes. Memory is
    that of a streamed evaluation: one copy of a layer's weight at a time.

    Args:
        optimizer: whose zeroth-order groups move, by their ``mu``, ``distribution`` and
            ``structure``; with ``active``, what the present step moves of them.
        closure: returns what the optimizer takes: the loss, or the losses of B examples where
            ``directions="per_example"``; here these share a direction.
        directions: at least 1.
        seed: other ones give other directions; none is one that a step takes.
        mu: the displacement along each; None: the groups' own.

    Returns:
        :class:`Along`.

    Raises:
        ValueError: ``directions``, ``seed`` or ``mu`` is out of range; there is no zeroth-order
            group, or several with unequal ``mu``, which have no common curvature.
        RuntimeError: called from inside a closure.
    """
    for name, value, least in (("directions", directions, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    if mu is not None and not 0 < mu < math.inf:
        raise ValueError(f"mu must be a finite number > 0, got {mu!r}")
    return along(optimizer, closure, directions, seed, optimizer.buffers, mu)


def along(
    optimizer: GroupsAndState,
    closure: Closure,
    directions: int,
    seed: int,
    buffers: Buffers,
    mu: float | None = None,
) -> Along:
    """See :func:`along_directions`; ``buffers`` are those that the closure changes."""
    sizes = {group.mu for group in optimizer.zo_groups()} if mu is None else {mu}
    if len(sizes) > 1:
        raise ValueError(
            f"optimizer must have one mu in all zeroth-order groups, got {sorted(sizes)}: groups "
            "displaced by different lengths have no common curvature; measure one at a time"
        )
    points = [Point(0, 0)] + [Point(k, sign) for k in range(directions) for sign in (1, -1)]
    of_examples = optimizer.settings.directions == "per_example"
    losses = losses_along(
        optimizer,
        closure,
        points,
        of_examples=of_examples,
        seed=seed,
        mu=mu,
        said="along_directions",
        buffers=buffers,
    )
    (mu,) = sizes
    clean, forth, back = losses[0], losses[1::2], losses[2::2]
    return Along(clean, (forth - back) / (2 * mu), (forth - 2 * clean + back) / mu**2)
