"""What one direction an example would gain over a shared one, from forward passes alone."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from .advice import Advice
from .estimators import ESTIMATORS
from .evaluation import Closure, Evaluator
from .groups_and_state import GroupsAndState
from .listeners import Listener
from .perturbation import StreamedPerturbation

_SEED = 0x9E3779B97F4A7C15
"""Added to the optimizer's: directions that no step takes."""


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
    of the optimizer changes. Generators are as after one evaluation.

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
    groups = optimizer.zo_groups()
    if not groups:
        raise ValueError("optimizer must have a group with mode='zo', got first-order groups only")
    if optimizer.evaluating:
        raise RuntimeError("per_example_gain must not be called inside a closure")
    settings = dataclasses.replace(
        optimizer.settings,
        estimator="two_sided",
        directions="shared",
        examples_per_direction=1,
        perturbation="streamed",
        num_samples=directions,
    )
    for group in groups:
        seed = (int(group.options["seed"]) + _SEED) % (1 << 64)
        group.options = {**group.options, "seed": seed}
    estimator = ESTIMATORS["two_sided"]
    points = estimator.points(directions, first_order=False)
    devices = {p.device for group in groups for p in group.params}
    perturbation = StreamedPerturbation(settings, Listener(), Advice())
    evaluator = Evaluator(per_example=True)
    evaluator.buffers = optimizer.buffers
    with (
        evaluator.buffers.as_before(),
        perturbation.over(perturbation.active(groups)),
        evaluator.runs(closure, (), devices) as run,
    ):
        losses = [e.loss for e in perturbation.visit(points, run)]
    slopes = estimator.differences(points, torch.stack(losses)).view(directions, -1).double()
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
