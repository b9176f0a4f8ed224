"""What a step takes: time as a multiple of a forward pass, and the most that live tensors take.

Each step is timed between two forward passes of the same batch, so that other work on the machine
lengthens all three: their ratio hardly depends on it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypedDict

import torch

from ..classification import Batch
from ..measure import growth, stored_bytes
from ..models import Problem
from ..partition.grid import Study
from ..partition.loop import PROFILED
from ..partition.problems import batches, longest_batch
from ..partition.recipes import PLAIN, Recipe, Saving, step_name
from ..partition.setups import Setup
from ..partition.steps import peak_of, ready
from .grid import cells, savings

ROUNDS = 7
"""Batches that are timed."""
FORWARD = "forward pass"


class Cost(TypedDict):
    """Of a step: the median of its time over that of a forward pass, its quartiles, and bytes."""

    passes: float
    quartiles: list[float]
    peak_bytes: int


def steps_of(study: Study) -> list[tuple[Recipe, Saving]]:
    """Those of the study's methods, plain and with what saves memory."""
    recipes = dict.fromkeys(cell.recipe for cell in cells(study))
    return [(recipe, saving) for recipe in recipes for saving in (PLAIN, *savings(recipe))]


def of_forward(problem: Problem, study: Study) -> Cost:
    """A forward pass without gradients: what the model takes where it is used."""
    weights = stored_bytes([*problem.base.parameters(), *problem.base.buffers()])
    longest = longest_batch(problem, study.batch)
    most = growth(lambda: _forward(problem, longest)).most
    return {"passes": 1.0, "quartiles": [1.0, 1.0], "peak_bytes": weights + most}


def of_step(problem: Problem, study: Study, recipe: Recipe, saving: Saving) -> Cost:
    """On the first batches of the first seed; rates do not matter to it."""
    own = list(islice(batches(problem, study.batch, 0), max(ROUNDS, PROFILED)))
    setup = ready(problem, recipe, saving, own[:PROFILED])
    ratios = _ratios(problem, setup, own[:ROUNDS])
    return {
        "passes": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "peak_bytes": peak_of(setup, longest_batch(problem, study.batch)),
    }


def _ratios(problem: Problem, setup: Setup, own: Sequence[Batch]) -> list[float]:
    found = []
    for batch in own:
        forward = partial(_forward, problem, batch)
        calls: tuple[Callable[[], Any], ...] = (forward, partial(setup.step, batch), forward)
        before, step, after = (_seconds(call) for call in calls)
        found.append(2 * step / (before + after))
    return found


def _forward(problem: Problem, batch: Batch) -> None:
    with torch.no_grad():
        problem.train.losses(problem.base, batch)


def _seconds(call: Callable[[], Any]) -> float:
    """Of the process, on one thread."""
    began = time.process_time()
    call()
    return time.process_time() - began


def peaks(problem: Problem, study: Study, methods: Iterable[Recipe]) -> dict[str, int]:
    """Bytes at the worst moment of the steps that save memory, by the step's name."""
    own = list(islice(batches(problem, study.batch, 0), PROFILED))
    found = {}
    for recipe in methods:
        for saving in savings(recipe):
            setup = ready(problem, recipe, saving, own)
            found[step_name(recipe, saving)] = peak_of(setup, longest_batch(problem, study.batch))
    return found
