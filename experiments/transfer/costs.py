"""Memory: the most that live tensors take while something is done to the large model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from zofo_optim.transfer import transfer_adapter
from zofo_optim.whole import write_json

from ..classification import Batch
from ..measure import growth, peak_memory, stored_bytes
from ..models import Problem
from ..partition.problems import longest_batch
from ..partition.setups import Setup
from ..search import SEARCHED
from .grid import BRIDGED, LORA, PLUGGED, REFINED, ROUTES, ZO, Cell
from .guard import no_graph
from .large import zeroth_order
from .runs import Searches
from .small import lora, plain_copy

RATE = 1e-6
"""Of steps; what they take does not depend on it."""
TOKENS = (4096, 1024)
"""Rows of activations that a transfer records: the library's default, and fewer."""
FORWARD, WEIGHTS = "a forward pass", "weights"


def measure(searches: Searches, console: Console) -> None:
    """Bytes by what is done, kept in a file; weights, of which a transfer has two models', count.

    Steps take the longest training batch, a transfer all of its texts. What is there is not
    measured again.
    """
    file, found = file_of(searches), read(searches)
    for name, measured in _all(searches).items():
        if name not in found:
            found[name] = size = measured()
            write_json(file, {"bytes": found})
            text = f"{searches.name}, {searches.task}: {name}: {size / 1e6:.1f} MB"
            console.print(text, highlight=False)


def _all(searches: Searches) -> dict[str, Callable[[], int]]:
    problem, batch = searches.problem, longest_batch(searches.problem, searches.study.batch)

    def zeroth(model: nn.Module, adapter: float | None) -> int:
        with no_graph(model):
            return step(zeroth_order(problem, model, RATE, adapter, 0), batch)

    found: dict[str, Callable[[], int]] = {
        WEIGHTS: lambda: _weights(problem.base),
        FORWARD: lambda: forward(problem, batch),
        LORA: lambda: step(lora(problem, RATE, 0), batch),
        ZO: lambda: zeroth(plain_copy(problem), None),
        REFINED: lambda: zeroth(searches.plugged(BRIDGED, SEARCHED)[0].model, RATE),
    }
    for route in ROUTES:
        cell = Cell(PLUGGED, route, BRIDGED.layers)
        for tokens in TOKENS:
            found[rows(cell, tokens)] = partial(transfer, searches, cell, tokens)
    found[f"{BRIDGED.name}, no text"] = partial(transfer, searches, BRIDGED, None)
    return found


def rows(cell: Cell, tokens: int) -> str:
    """The name of a transfer that records so many."""
    return f"{cell.name}, {tokens} rows"


def file_of(searches: Searches) -> Path:
    """Where they are kept."""
    return searches.folder / "costs.json"


def read(searches: Searches) -> dict[str, int]:
    """Those that have been measured; empty where none were."""
    file = file_of(searches)
    if not file.is_file():
        return {}
    found: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))["bytes"]
    return found


def _weights(*models: nn.Module) -> int:
    return stored_bytes(t for model in models for t in [*model.parameters(), *model.buffers()])


def step(setup: Setup, batch: Batch) -> int:
    """Of a step on the batch, after two that make the optimizer's state."""

    def one() -> None:
        setup.step(batch)
        setup.optimizer.zero_grad()

    one()
    one()
    return peak_memory(one, setup.model, setup.optimizer, torch.device("cpu"))


def forward(problem: Problem, batch: Batch) -> int:
    """Of the losses of the batch, without a graph."""
    model = plain_copy(problem)

    @torch.no_grad()
    def one() -> None:
        problem.train.losses(model, batch)

    one()
    return _weights(model) + growth(one).most


def transfer(searches: Searches, cell: Cell, tokens: int | None) -> int:
    """Of recording both models' activations, if any, and of carrying the adapter over."""
    small, _ = searches.trained_small(cell, SEARCHED)
    model = plain_copy(searches.problem)
    texts = None if tokens is None else searches.texts
    before = _weights(model, small)

    def one() -> None:
        transfer_adapter(small, model, texts, tokens=tokens or 1)

    with no_graph(model):
        return before + growth(one).most
