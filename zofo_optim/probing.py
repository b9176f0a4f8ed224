"""Losses at weights displaced along an optimizer's kind of directions, from forward passes alone.

Nothing is trained: no weight, no buffer and nothing of the optimizer changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .advice import Advice
from .buffers import Buffers
from .estimators import Point
from .evaluation import Closure, Evaluator, GlobalRandomState
from .groups_and_state import GroupsAndState
from .listeners import Listener
from .perturbation import StreamedPerturbation

_SEED = 0x9E3779B97F4A7C15
"""Added to the optimizer's: directions that no step takes."""


def losses_along(
    optimizer: GroupsAndState,
    closure: Closure,
    points: Sequence[Point],
    *,
    of_examples: bool,
    seed: int = 0,
    mu: float | None = None,
    distribution: str | None = None,
    said: str,
    buffers: Buffers | None = None,
) -> Tensor:
    """The losses at the points, in order; each direction is shared by the whole batch.

    Weights are displaced in copies (streamed), so that none is written. All evaluations draw the
    same random numbers and start from the same buffers; generators and buffers are then as before.

    Args:
        optimizer: whose zeroth-order groups, ``mu``, distribution and structure are taken; of
            their parameters, what the present step moves (``active``).
        closure: returns the loss, or the losses of B examples.
        points: without gradients; a ``sign`` may be any multiple.
        of_examples: which of the two.
        seed: other ones give other directions.
        mu: how far the points are; None: as the groups have it.
        distribution: of the directions; None: the optimizer's.
        said: the caller's name, for messages.
        buffers: those that the closure changes; None: the optimizer's.

    Returns:
        Shape (points,) or (points, B), float64.

    Raises:
        ValueError: the optimizer has no zeroth-order group, or one has a ``unit``.
        RuntimeError: called from inside a closure.
    """
    groups = optimizer.zo_groups()
    if not groups:
        raise ValueError("optimizer must have a group with mode='zo', got first-order groups only")
    if optimizer.evaluating:
        raise RuntimeError(f"{said} must not be called inside a closure")
    if any(group.unit != 1.0 for group in groups):
        raise ValueError(
            f"{said} needs groups without a unit, got {[group.unit for group in groups]}: those of "
            "quantisation scales, which are not perturbed streamed, cannot be measured"
        )
    settings = dataclasses.replace(
        optimizer.settings,
        distribution=distribution or optimizer.settings.distribution,
        estimator="two_sided",
        directions="shared",
        examples_per_direction=1,
        perturbation="streamed",
        num_samples=1 + max(point.sample for point in points),
        coupling=0.0,
        optimizer_in_backward=False,
    )
    perturbation = StreamedPerturbation(settings, Listener(), Advice())
    if distribution is not None:  # the optimizer's groups have its own
        groups = perturbation.groups_of(optimizer.param_groups)
    for group in groups:
        own = (int(group.options["seed"]) + _SEED + seed) % (1 << 64)
        group.options = {**group.options, "seed": own, "mu": group.mu if mu is None else mu}
    devices = {p.device for group in groups for p in group.params}
    evaluator = Evaluator(per_example=of_examples)
    evaluator.buffers = optimizer.buffers if buffers is None else buffers
    random = GlobalRandomState(devices)
    try:
        with (
            evaluator.buffers.as_before(),
            perturbation.over(perturbation.active(groups)),
            evaluator.runs(closure, (), devices) as run,
        ):
            losses = [evaluation.loss for evaluation in perturbation.visit(points, run)]
    finally:
        random.restore()
    return torch.stack(losses).double()
