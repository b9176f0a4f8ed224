"""What one direction an example would gain over a shared one, from forward passes alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .estimators import ESTIMATORS
from .evaluation import Closure
from .groups_and_state import GroupsAndState
from .probing import losses_along


class Gain(NamedTuple):
    """See :func:`per_example_gain`."""

    gain: float
    """Estimate of B ||mean_b g_b||^2 / mean_b ||g_b||^2."""
    standard_error: float
    """Of it, by the jackknife over directions."""
    examples: int
    """B; of those that share a direction, one is counted."""


def per_example_gain(optimizer: GroupsAndState, closure: Closure, *, directions: int = 16) -> Gain:
    """How much less variance one direction an example has than a direction for the whole batch.

    What limits a zeroth-order learning rate is E[g' H g] of its estimate g. It is
    (mean_b ||g_b||^2 / B) tr H with one direction for each of B examples, and ||mean_b g_b||^2
    tr H with a shared one, for gradients g_b of the examples. The ratio is
    1 + (B - 1) ||g||^2 / E ||g_b||^2 in expectation over batches: up to B where examples agree,
    never below 1; a batch whose examples disagree by chance may give less. Slopes s_b of the
    examples' losses along random directions give both terms, as E s_b s_c = g_b . g_c.

    Takes 2 evaluations a direction and some 10 to 25 that verify; no weight, no buffer and nothing
    of the optimizer or of the global generators changes.

    Args:
        optimizer: whose zeroth-order groups, ``mu`` and kind of directions are measured.
        closure: returns the losses of B >= 2 examples, shape (B,).
        directions: at least 2.

    Returns:
        :class:`Gain`.

    Raises:
        ValueError: too few directions or examples, or no zeroth-order group.
        RuntimeError: called from inside a closure.
    """
    if not isinstance(directions, int) or isinstance(directions, bool) or directions < 2:
        raise ValueError(f"directions must be an int >= 2, got {directions!r}")
    estimator = ESTIMATORS["two_sided"]
    points = estimator.points(directions, first_order=False)
    losses = losses_along(optimizer, closure, points, of_examples=True, said="per_example_gain")
    slopes = estimator.differences(points, losses).view(directions, -1)
    together = optimizer.settings.examples_of_a_direction
    if slopes.shape[1] % together:
        raise ValueError(
            f"closure must return the losses of a multiple of {together} examples, which share a "
            f"direction, got {slopes.shape[1]}"
        )
    slopes = slopes.view(directions, -1, together).mean(2)
    if slopes.shape[1] < 2:
        raise ValueError("closure must return the losses of at least 2 examples, got 1")
    return _gain(slopes)


def _gain(slopes: Tensor) -> Gain:
    """Of slopes (directions, B)."""
    count, examples = slopes.shape
    together, each = slopes.mean(1).square(), slopes.square().mean(1)
    without = (together.sum() - together) / (each.sum() - each)  # one direction at a time
    spread = (without - without.mean()).square().sum() * (count - 1) / count
    gain = examples * together.sum() / each.sum()
    return Gain(gain.item(), examples * spread.sqrt().item(), examples)
