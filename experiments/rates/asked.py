"""What the library says of one setting, before the first step of its run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zofo_optim import HybridZOFO, suggest_hyperparameters

from ..directions.grid import Cell
from ..finetune import Runs
from ..training import closure_of, prepared

BATCHES = 4
SWEPT = 16
"""Batches that a range test has."""


def setting(runs: Runs, cell: Cell, rates: Mapping[str, float]) -> tuple[HybridZOFO, list[Any]]:
    """As a run of the grid begins: its optimizer, and closures of batches.

    Args:
        runs: of the command line.
        cell: the setting.
        rates: ``lr_zo`` and ``lr_fo``, as the method needs them.
    """
    settings = runs.settings(cell.task, cell.method, 0, **{**cell.options, **rates})
    problem = runs.problem(settings)
    model, optimizer = prepared(settings, problem)
    model.train()
    draw = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(problem.train), generator=draw).tolist()
    size = settings.batch_size
    closures = [
        closure_of(settings, problem, model, problem.train.batch(order[i : i + size]))
        for i in range(0, min(SWEPT * size, len(order) - size + 1), size)
    ]
    return optimizer, closures


def suggested(
    model: str, cell: Cell, optimizer: HybridZOFO, closures: Sequence[Any]
) -> dict[str, Any]:
    """What `suggest_hyperparameters` says of a setting, as a row."""
    started = time.perf_counter()
    found = suggest_hyperparameters(optimizer, closures[:BATCHES])
    return {
        "model": model,
        "task": cell.task,
        "method": cell.method,
        "kind": cell.kind,
        "rate": cell.rate,
        "suggested": getattr(found.practical, cell.rate),
        "mu": found.practical.mu,
        "said": str(found),
        "seconds": time.perf_counter() - started,
        "evaluations": found.evaluations,
    }
