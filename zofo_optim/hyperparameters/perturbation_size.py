"""The perturbation step size mu, from what limits a slope: truncation above, rounding below.

With the noise s of a computed loss, its curvature c and third derivative t along a direction, the
squared error of a slope is, for the two-sided and the one-sided estimate,

    (t mu^2 / 6)^2 + s^2 / (2 mu^2),    least at    mu = (3 s / t)^(1/3),
    (c mu / 2)^2 + 2 s^2 / mu^2,        least at    mu = (8 s^2 / c^2)^(1/4),

the textbook's balance (Nocedal, Wright, Numerical Optimization, section 8.1). All three are
measured: c at ``mu``, t from slopes at ``mu`` and 2 ``mu``, and s from second differences at a
thousandth of ``mu``, where nothing but noise is left of them. Errors are root mean squares over
directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..evaluation import Closure
from ..groups_and_state import GroupsAndState
from ..smoothness import Along, along_directions

_TINY = 1e-3
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
    optimizer: GroupsAndState, closure: Closure, here: Along, seed: int
) -> PerturbationSize:
    """On one batch; see the module.

    Args:
        optimizer: whose mu it is.
        closure: of the batch.
        here: what was measured with that mu, along directions of ``seed``; the first 8 are taken.
        seed: of them.
    """
    (mu,) = {group.mu for group in optimizer.zo_groups()}
    directions = min(_DIRECTIONS, len(here.slopes))
    here = Along(here.loss, here.slopes[:directions], here.curvatures[:directions])
    twice, tiny = (
        along_directions(optimizer, closure, directions=directions, seed=seed, mu=size)
        for size in (2 * mu, _TINY * mu)
    )
    left = (tiny.curvatures - here.curvatures) * (_TINY * mu) ** 2
    rounding = 2.0**-53 * here.loss.abs().max().item()
    noise = max((left.square().mean() / 6).sqrt().item(), rounding)
    slope = here.slopes.square().mean().sqrt().item()
    if not (slope > 0 and math.isfinite(noise)):
        raise FloatingPointError(
            "closures must return finite losses that differ along random directions, got slopes of "
            f"size {slope} with mu={mu}"
        )
    two_sided = optimizer.settings.estimator != "one_sided"
    if two_sided:
        third = 2 * (twice.slopes - here.slopes) / mu**2
        of_noise = 2.5 * noise**2 / mu**6  # in its square
        bends = math.sqrt(max(0.0, third.square().mean().item() - of_noise))
        best = (3 * noise / bends) ** (1 / 3) if bends else math.inf
    else:
        of_noise = 6 * noise**2 / mu**4
        bends = math.sqrt(max(0.0, here.curvatures.square().mean().item() - of_noise))
        best = 8**0.25 * math.sqrt(noise / bends) if bends else math.inf

    def error(size: float) -> float:
        if size == math.inf:
            return 0.0
        truncation = bends * size**2 / 6 if two_sided else bends * size / 2
        rounded = noise / (math.sqrt(2) * size) if two_sided else math.sqrt(2) * noise / size
        return math.hypot(truncation, rounded) / slope

    return PerturbationSize(mu, error(mu), best, error(best), noise, 2 * (1 + 2 * directions))
