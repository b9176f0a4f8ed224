"""The perturbation step size mu, from what limits a slope: truncation above, rounding below.

With the noise s of a computed loss, its curvature c and third derivative t along a direction, the
squared error of a slope is, for the two-sided and the one-sided estimate,

    (t mu^2 / 6)^2 + s^2 / (2 mu^2),    least at    mu = (3 s / t)^(1/3),
    (c mu / 2)^2 + 2 s^2 / mu^2,        least at    mu = (8 s^2 / c^2)^(1/4),

the textbook's balance (Nocedal, Wright, Numerical Optimization, section 8.1). All three are
measured where they can be seen, which a small mu does not allow: c and t from slopes and curvatures
at the displacement of :func:`zofo_optim.smoothness.forward.curvature_mu`, mu or longer, and at
twice that; s from sixth differences, and never below a few spacings of the weights' numbers. Errors
are root mean squares over directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..evaluation import Closure
from ..groups_and_state import GroupsAndState
from ..smoothness import Along, along_directions
from ..smoothness.forward import Displacement

_DIRECTIONS = 8
FINE = 0.1
"""An error of a slope, over its size, that leaves ``mu`` as it is."""


@dataclass(frozen=True)
class PerturbationSize:
    """What was measured of mu."""

    mu: float
    """As the groups have it."""
    error: float
    """Of a slope there, over the slopes' root mean square."""
    best: float
    """The mu of the least error; infinite where the loss is too straight to tell."""
    best_error: float
    noise: float
    """Of a computed loss."""
    evaluations: int


def measure(
    optimizer: GroupsAndState, closure: Closure, here: Along, size: Displacement, seed: int
) -> PerturbationSize:
    """On one batch; see the module.

    Args:
        optimizer: whose mu it is.
        closure: of the batch.
        here: what was measured by ``size``, along directions of ``seed``; the first 8 are taken.
        size: how far, and the noise.
        seed: of them.
    """
    (mu,) = {group.mu for group in optimizer.zo_groups()}
    far, noise = size.mu, size.noise
    directions = min(_DIRECTIONS, len(here.slopes))
    here = Along(here.loss, here.slopes[:directions], here.curvatures[:directions])
    twice = along_directions(optimizer, closure, directions=directions, seed=seed, mu=2 * far)
    slope = here.slopes.square().mean().sqrt().item()
    if not (slope > 0 and math.isfinite(noise)):
        raise FloatingPointError(
            "closures must return finite losses that differ along random directions, got slopes of "
            f"size {slope} with mu={far:g}"
        )
    two_sided = optimizer.settings.estimator != "one_sided"
    if two_sided:
        third = 2 * (twice.slopes - here.slopes) / far**2
        of_noise = 2.5 * noise**2 / far**6  # in its square
        bends = math.sqrt(max(0.0, third.square().mean().item() - of_noise))
        best = (3 * noise / bends) ** (1 / 3) if bends else math.inf
    else:
        of_noise = 6 * noise**2 / far**4
        bends = math.sqrt(max(0.0, here.curvatures.square().mean().item() - of_noise))
        best = 8**0.25 * math.sqrt(noise / bends) if bends else math.inf

    def error(at: float) -> float:
        if at == math.inf:
            return 0.0
        truncation = bends * at**2 / 6 if two_sided else bends * at / 2
        rounded = noise / (math.sqrt(2) * at) if two_sided else math.sqrt(2) * noise / at
        return math.hypot(truncation, rounded) / slope

    if best < size.least:
        best = size.least
    if best == math.inf and error(mu) > FINE:  # the farthest that has been looked at
        best = 2 * far
    return PerturbationSize(mu, error(mu), best, error(best), noise, 1 + 2 * directions)
