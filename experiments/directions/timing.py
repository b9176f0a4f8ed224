"""Seconds of a step, measured apart from the runs: in turn, on the same batches, on one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console

from benchmarks.zofo_bench.mezo import MeZO

from ..finetune import Runs
from ..models import Problem
from ..settings import Settings
from ..training import closure_of, prepared
from .grid import Cell

RECIPE = "MeZO's recipe"
"""As published: three passes that draw Gaussian noise by torch, then the update."""
Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], Any]


def step_seconds(
    runs: Runs, cells: Iterable[Cell], rounds: int, console: Console
) -> dict[str, dict[str, Any]]:
    """By the cell's name and :data:`RECIPE`: seconds of a step, the median, and its quartiles.

    Every round makes a step of each on the round's batch. Rates are 0, which changes no cost.
    """
    steps: dict[str, Step] = {}
    problem: Problem | None = None
    settings: Settings | None = None
    for cell in cells:
        rates = {} if cell.after is None else {"lr_fo": 0.0}
        settings = runs.settings(
            cell.task, cell.method, 0, **{**cell.options, cell.rate: 0.0, **rates}
        )
        problem = runs.problem(settings)
        steps[cell.name] = _stepper(settings, problem)
        if cell.method == "zo" and RECIPE not in steps:
            steps[RECIPE] = _published(settings, problem)
    assert problem is not None
    assert settings is not None
    draw = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-2, rounds):  # the first ones verify and compile
        order = torch.randperm(len(problem.train), generator=draw).tolist()
        batch = problem.train.batch(order[: settings.batch_size])
        for name, step in steps.items():
            started = time.perf_counter()
            step(batch)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
        console.print(f"round {number + 1} of {rounds}", highlight=False)
    return {
        name: {
            "seconds": statistics.median(found),
            "quartiles": statistics.quantiles(found, n=4)[::2],
        }
        for name, found in seconds.items()
    }


def _stepper(settings: Settings, problem: Problem) -> Step:
    model, optimizer = prepared(settings, problem)
    model.train()

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        optimizer.step(closure_of(settings, problem, model, batch))

    return step


def _published(settings: Settings, problem: Problem) -> Step:
    model, optimizer = prepared(settings, problem)
    model.train()
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    mezo = MeZO(weights, lambda: torch.zeros(()), lr=0.0, eps=settings.mu)

    def step(batch: Batch) -> None:
        mezo.closure = lambda: problem.train.losses(model, batch).mean()
        with torch.no_grad():
            mezo.step()

    return step
