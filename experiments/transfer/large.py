"""What is done to the large model: adapters plugged in, and steps of zeroth order."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.transfer import TransferReport, transfer_adapter, zo_param_groups

from ..classification import Batch
from ..models import Problem
from ..partition.recipes import KINDS, MU, PER_EXAMPLE
from ..partition.setups import Setup
from .guard import no_graph
from .small import plain_copy


@dataclass(frozen=True)
class Way:
    """How an adapter is carried over: arguments of the library's function; its defaults.

    Attributes:
        layers: a policy, or which small layer each large one takes.
        width: of the projections.
    """

    layers: str | Mapping[int, int] | None = None
    width: str | None = None


DEFAULT = Way()


@dataclass
class Plugged:
    """A large model with an adapter of a small one.

    Attributes:
        seconds: of the process, that carrying it over took.
    """

    model: nn.Module
    report: TransferReport
    seconds: float


def plug(problem: Problem, small: nn.Module, texts: Sequence[Batch], way: Way = DEFAULT) -> Plugged:
    """Carry the adapter of a small model over to a copy of the problem's.

    Raises:
        GraphError: a graph was built.
    """
    model = plain_copy(problem)
    began = time.process_time()
    with no_graph(model):
        adapted, report = transfer_adapter(
            small, model, list(texts), layers=way.layers, width=way.width
        )
    seconds = time.process_time() - began
    with no_graph(adapted):
        return Plugged(adapted, report, seconds)


def zeroth_order(
    problem: Problem, model: nn.Module, base: float, adapter: float | None, seed: int
) -> Setup:
    """The model trains by forward passes alone, along a direction of rank 1 for each example.

    Args:
        model: is changed.
        base, adapter: rates of what was there before the adapter, and of it with the head that it
            has; None where there is no adapter.
    """
    torch.manual_seed(seed)
    rule = {"lr": base, "mu": MU}
    groups = hybrid_param_groups(model, zo=rule, directions="per_example", verbose=False)
    if adapter is not None:
        groups += zo_param_groups(model, adapter={"lr": adapter, "mu": MU})
    model.train()
    optimizer = HybridZOFO(groups, estimator="two_sided", seed=seed, **KINDS[PER_EXAMPLE])
    return Setup(model, optimizer, lambda batch: problem.train.losses(model, batch), [], {})
