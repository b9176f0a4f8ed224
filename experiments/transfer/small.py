"""The small models, and the adapters that are trained on them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from zofo_optim import HybridZOFO, transfer

from ..heads import set_head
from ..methods import METHODS, AdapterOptions, prepare
from ..models import Problem
from ..partition.setups import OPTIMIZERS, Setup
from .grid import RANK, SMALL
from .slices import evenly, sliced
from .texts import unlabelled


def small_problem(problem: Problem, route: str, layers: int, head: str) -> Problem:
    """The problem with a small model, whose head, if it has one, starts from its own features.

    Args:
        route: of :data:`grid.ROUTES`.
        layers: how many; a slice has evenly spaced ones, a bridge those that it chooses.
        head: the first one, of :data:`experiments.heads.HEADS`.
    """
    large = problem.base
    if route == SMALL:
        small = sliced(large, evenly(layers, large.config.num_hidden_layers))
    else:
        small = transfer.bridge_model(large, unlabelled(problem), layers=layers)
    made = replace(problem, base=small)
    if not problem.causal:
        set_head(made, head)
    return made


def lora(problem: Problem, lr: float, seed: int) -> Setup:
    """A copy of the problem's model whose LoRA, and head, train by first order."""
    torch.manual_seed(seed)
    method, options = METHODS["fo-lora"], AdapterOptions(rank=RANK)
    model, groups = prepare(method, problem, options, zo={}, fo={"lr": lr}, include=())
    return first_order(problem, model, groups)


def first_order(problem: Problem, model: Any, groups: list[dict[str, Any]]) -> Setup:
    """What AdamW trains."""
    model.train()
    kind, options = OPTIMIZERS["adamw"]
    optimizer = HybridZOFO(groups, fo_optimizer=kind, weight_decay=0, **options)
    return Setup(model, optimizer, lambda batch: problem.train.losses(model, batch).mean(), [], {})


def plain_copy(problem: Problem) -> Any:
    """Of the large model, frozen."""
    model = copy.deepcopy(problem.base)
    model.requires_grad_(False)
    return model
