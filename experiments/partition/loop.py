"""One run: steps, evaluations between them, and the scores of the best weights."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import Problem
from ..report import Result
from .problems import batches
from .recipes import PLAIN, Recipe, Saving
from .setups import Setup, set_up

PROFILED = 4
"""Batches that a partition is chosen on: the first that train."""


def run(
    problem: Problem,
    recipe: Recipe,
    *,
    lr_fo: float | None,
    lr_zo: float | None,
    seed: int,
    steps: int,
    batch: int,
    evaluations: int,
    saving: Saving = PLAIN,
    partitions: Path | None = None,
) -> Result:
    """Train at rates that fall linearly to 0, and test the weights of the best evaluation.

    Seconds are those of the process on the CPU, on one thread: what else runs on the machine
    lengthens them little. Evaluations and the choice of a partition are not counted.

    Args:
        partitions: see :func:`setups.set_up`.

    Returns:
        ``curve``: step, seconds, development loss and accuracy of each evaluation, the first before
        any step; ``best``: that with the lowest loss; ``test`` of its weights; sizes; of a
        partition ``fo_tensors`` by name, and what is ``predicted``.
    """
    first = list(islice(batches(problem, batch, seed), PROFILED))
    started = time.process_time()
    setup = set_up(
        problem,
        recipe,
        lr_fo=lr_fo,
        lr_zo=lr_zo,
        seed=seed,
        batches=first,
        saving=saving,
        partitions=partitions,
    )
    setting_up = time.process_time() - started
    return {
        **train(problem, setup, seed=seed, steps=steps, batch=batch, evaluations=evaluations),
        "test": asdict(problem.test.score(setup.model)),
        "test_examples": len(problem.test),
        "scored": problem.form.scored,
        "setting_up_seconds": setting_up,
        "fo_tensors": setup.tensors if setup.predicted else [],
        "predicted": setup.predicted,
    }


def train(
    problem: Problem, setup: Setup, *, seed: int, steps: int, batch: int, evaluations: int
) -> Result:
    """Take the steps, and load the weights of the best evaluation.

    Returns:
        What :func:`run` does, but for the test and for partitions.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(setup.optimizer, lambda step: 1 - step / steps)
    record = _Record(problem, setup)
    record.evaluate(0)
    ends = {math.ceil((number + 1) * steps / evaluations) for number in range(evaluations)}
    for step, taken in enumerate(islice(batches(problem, batch, seed), steps), start=1):
        began = time.process_time()
        setup.step(taken)
        schedule.step()
        record.seconds += time.process_time() - began
        if step in ends:
            record.evaluate(step)
    record.load_best()
    return {
        "curve": record.curve,
        "best": record.best,
        "skipped_steps": int(setup.optimizer.skipped_steps),
        "parameters_fo": setup.count("fo"),
        "parameters_zo": setup.count("zo"),
    }


class _Record:
    """The curve, and the weights of its best evaluation."""

    def __init__(self, problem: Problem, setup: Setup) -> None:
        self._problem, self._model = problem, setup.model
        groups = setup.optimizer.param_groups
        self._trained: list[Tensor] = [p for group in groups for p in group["params"]]
        self._kept: list[Tensor] = []
        self.seconds, self.curve = 0.0, list[dict[str, Any]]()
        self.best: dict[str, Any] = {"loss": math.inf}

    def evaluate(self, step: int) -> None:
        scores = self._problem.dev.score(self._model)
        point = {
            **{"step": step, "seconds": self.seconds},
            **{"loss": scores.loss, "accuracy": scores.accuracy},
        }
        self.curve.append(point)
        if scores.loss < self.best["loss"] or not self._kept:
            self.best = point
            self._kept = [p.detach().clone() for p in self._trained]

    @torch.no_grad()
    def load_best(self) -> None:
        for parameter, kept in zip(self._trained, self._kept, strict=True):
            parameter.copy_(kept)
