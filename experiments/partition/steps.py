"""What steps cost: seconds and the most that live tensors take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TypedDict

import torch

from ..classification import Batch
from ..measure import peak_memory
from ..models import Problem
from .loop import PROFILED
from .problems import batches, longest_batch
from .recipes import Recipe, Saving
from .setups import Setup, set_up

WARM = 2
"""Steps before any is timed: they verify, compile, and make the optimizer's state."""
RATE = 1e-6
"""Of both orders; what steps cost does not depend on it."""


class StepCost(TypedDict):
    """Of a step: seconds on one thread, and bytes of live tensors at its worst moment."""

    seconds: float
    peak_bytes: int
    predicted: dict[str, float]


def ready(
    problem: Problem,
    recipe: Recipe,
    saving: Saving,
    batches: Sequence[Batch],
    partitions: Path | None = None,
) -> Setup:
    """What trains, of the first seed, after the steps that come before any is measured.

    Args:
        batches: that a partition is chosen on; the first one trains.
        partitions: see :func:`setups.set_up`.
    """
    setup = set_up(
        problem,
        recipe,
        lr_fo=RATE if recipe.first else None,
        lr_zo=RATE if recipe.kind else None,
        seed=0,
        batches=batches,
        saving=saving,
        partitions=partitions,
    )
    for _ in range(WARM):
        setup.step(batches[0])
    return setup


def cost(setup: Setup, batches: Sequence[Batch], longest: Batch, rounds: int) -> StepCost:
    """
    Args:
        setup: that is :func:`ready`; its weights change.
        batches: that are timed, each ``rounds`` times, of which the quickest counts.
        longest: the batch that memory is measured on.
    """
    times = [min(_timed(setup, batch) for _ in range(rounds)) for batch in batches]
    return {
        "seconds": statistics.fmean(times),
        "peak_bytes": peak_of(setup, longest),
        "predicted": setup.predicted,
    }


def peak_of(setup: Setup, longest: Batch) -> int:
    """The most bytes that live tensors take in a step; weights change, and state must be there."""

    def step() -> None:
        setup.step(longest)
        setup.optimizer.zero_grad()

    setup.optimizer.zero_grad()
    return peak_memory(step, setup.model, setup.optimizer, torch.device("cpu"))


def _timed(setup: Setup, batch: Batch) -> float:
    began = time.process_time()
    setup.step(batch)
    return time.process_time() - began


def measured(
    problem: Problem,
    recipe: Recipe,
    saving: Saving,
    *,
    batch: int,
    count: int,
    rounds: int,
    profiled: int = PROFILED,
    partitions: Path | None = None,
) -> StepCost:
    """Of a recipe on the first ``count`` batches of the first seed.

    Args:
        profiled: batches that a partition is chosen on.
        partitions: see :func:`setups.set_up`.
    """
    own = list(islice(batches(problem, batch, 0), max(count, profiled)))
    setup = ready(problem, recipe, saving, own[:profiled], partitions)
    return cost(setup, own[:count], longest_batch(problem, batch), rounds)
