"""Slopes and curvatures along random directions, from losses alone: no backward, no gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..buffers import Buffers
from ..estimators import Point
from ..evaluation import Closure
from ..groups_and_state import GroupsAndState
from ..probing import losses_along
from .seeing import SeeingShort
from .vectors import dot, scale_of

_LINES = 4
"""Directions that a displacement is chosen along."""
_ULPS = 4
"""Least displacement, in spacings of the weights' numbers."""
_FINER = 30
"""Noise is looked at over displacements so much shorter than mu."""
_SIXTH = 924
"""The sum of the squares of a sixth difference's coefficients, 1, 6, 15, 20, ..."""
NOISY = 0.03
"""Noise of a curvature, over its size, that is small."""
_LARGEST = 0.1
"""Displacement, over the weights' root mean square, beyond which none is sought."""


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
    distribution: str | None = None,
) -> Along:
    """The loss, its slopes and its curvatures along directions as the optimizer draws them.

    For directions v with E[v v'] = I, a Gaussian's or of signs or low rank, E[slope^2] is
    ||grad f||^2 and E[curvature] is tr H, the trace of the Hessian with regard to what moves. What
    a zeroth-order step along one direction does to the loss in expectation is
    -lr E[slope^2] + lr^2 E[slope^2 curvature] / 2.

    The errors of both are O(mu^2). Rounding of the loss adds about 1e-7 |f| / mu to a slope and
    4e-7 |f| / mu^2 to a curvature where the loss is float32: :func:`curvature_mu` gives a ``mu``
    at which the curvature is more than that.

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
        distribution: of the directions, "gaussian" or "rademacher"; None: the optimizer's.

    Returns:
        :class:`Along`.

    Raises:
        ValueError: an argument is out of range; there is no zeroth-order
            group, or several with unequal ``mu``, which have no common curvature.
        RuntimeError: called from inside a closure.
    """
    for name, value, least in (("directions", directions, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    if mu is not None and not 0 < mu < math.inf:
        raise ValueError(f"mu must be a finite number > 0, got {mu!r}")
    if distribution not in (None, "gaussian", "rademacher"):
        raise ValueError(
            f"distribution must be 'gaussian', 'rademacher' or None, got {distribution!r}"
        )
    return along(optimizer, closure, directions, seed, optimizer.buffers, mu, distribution)


def along(
    optimizer: GroupsAndState,
    closure: Closure,
    directions: int,
    seed: int,
    buffers: Buffers,
    mu: float | None = None,
    distribution: str | None = None,
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
        distribution=distribution,
        said="along_directions",
        buffers=buffers,
    )
    (mu,) = sizes
    clean, forth, back = losses[0], losses[1::2], losses[2::2]
    return Along(clean, (forth - back) / (2 * mu), (forth - 2 * clean + back) / mu**2)


class Displacement(NamedTuple):
    """How far to go, and what limits it."""

    mu: float
    """For curvatures; see :func:`curvature_mu`."""
    noise: float
    """Standard deviation of a computed loss, of rounding."""
    least: float
    """Shorter ones are rounded away, as weights do not move."""
    evaluations: int
    """That it took, without those that verify."""

    @property
    def curvature_noise(self) -> float:
        """Standard deviation of a curvature along one direction at ``mu``."""
        return math.sqrt(6) * self.noise / self.mu**2


def curvature_mu(optimizer: GroupsAndState, closure: Closure, *, seed: int = 0) -> float:
    """A displacement for :func:`along_directions` at which curvatures are more than rounding.

    A second difference has the noise of four losses over mu^2, so it needs a longer displacement
    than a slope, which trains well at 1e-5. It is the groups' own mu where noise is below 3 % of
    the curvature there; else it grows until that holds, up to a tenth of the weights' root mean
    square (where curvature is still noise, as of a linear loss, it ends there). It is never below 4
    spacings of the weights' numbers (of bfloat16 ones under autocast), which would not move them.

    Takes some 40 to 80 evaluations, and 10 to 25 that verify in each of 2 to 6 rounds.

    Args:
        optimizer, closure: as :func:`along_directions` takes them; of unequal ``mu``, the largest
            counts.
        seed: of the directions.

    Raises:
        ValueError: there is no zeroth-order group.
        RuntimeError: called from inside a closure.
    """
    return displacement(optimizer, closure, seed).mu


def displacement(optimizer: GroupsAndState, closure: Closure, seed: int) -> Displacement:
    """See :func:`curvature_mu`.

    Noise is what is left of sixth differences of the loss along a line (Hamming 1962; Moré, Wild
    2011): over short displacements nothing smooth is, as they take off a polynomial of degree 5.
    """
    count = 0

    def losses(points: Sequence[Point], mu: float | None) -> Tensor:
        nonlocal count
        count += len(points)
        of_examples = optimizer.settings.directions == "per_example"
        found = losses_along(
            optimizer,
            closure,
            points,
            of_examples=of_examples,
            seed=seed,
            mu=mu,
            said="curvature_mu",
        )
        return found.reshape(len(points), -1).mean(1)

    with SeeingShort() as seeing:
        losses([Point(0, 0)], None)
    groups = optimizer.zo_groups()
    params = [p for group in groups for p in group.params]
    least = _ULPS * _spacing(params, 2.0**-7 if seeing.seen else 0.0)
    own = max(group.mu for group in groups)
    largest = _LARGEST * scale_of(params) / math.sqrt(sum(p.numel() for p in params))

    multiples = [j for j in range(-3, 4) if j]
    points = [Point(0, 0)] + [Point(k, j) for k in range(_LINES) for j in multiples]
    found = losses(points, max(own / _FINER, least))
    sides = found[1:].view(_LINES, 6)
    coefficients = found.new_tensor([1.0, -6.0, 15.0, 15.0, -6.0, 1.0])
    sixth = sides @ coefficients - 20 * found[0]
    noise = max((sixth.square().mean() / _SIXTH).sqrt().item(), rounding_of(found))

    points = [Point(0, 0)] + [Point(k, sign) for k in range(_LINES) for sign in (1, -1)]
    mu = max(own, least)
    while True:
        found = losses(points, mu)
        curvatures = (found[1::2] - 2 * found[0] + found[2::2]) / mu**2
        square, of_noise = curvatures.square().mean().item(), 6 * (noise / mu**2) ** 2
        if not of_noise > NOISY**2 * square or mu >= largest:
            return Displacement(mu, noise, least, count)
        size = math.sqrt(max(square - of_noise, 0.0))
        enough = math.sqrt(math.sqrt(6) * noise / (NOISY * size)) if size else math.inf
        mu = min(largest, max(2 * mu, min(1.1 * enough, 10 * mu)))


def rounding_of(losses: Tensor) -> float:
    """The standard deviation of rounding the largest loss to the type that all fit in."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(losses.to(dtype).double(), losses):
            break
    else:
        dtype = torch.float64
    return torch.finfo(dtype).eps * losses.abs().max().item() / math.sqrt(48)


def _spacing(params: Sequence[Tensor], least: float) -> float:
    """Of numbers such as the weights' root mean square; ``least`` is of 1."""
    size = sum(p.numel() for p in params)
    squares = 0.0
    for p in params:
        unit = max(torch.finfo(p.dtype).eps, least)
        squares += unit**2 * max(dot([p.detach()], [p.detach()]), 1e-4 * p.numel())
    return math.sqrt(squares / size)
