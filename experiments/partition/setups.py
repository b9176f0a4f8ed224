"""A model and an optimizer, as a recipe says."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.partition import Partition, make_partition

from ..classification import Batch
from ..heads import last_linear
from ..methods import METHODS, AdapterOptions, prepare, trained_parameters
from ..models import ModelError, Problem
from .recipes import (
    ALL,
    FROZEN,
    HEAD,
    INCLUDED,
    KINDS,
    LORA,
    MU,
    PARTITION,
    PER_EXAMPLE,
    PLAIN,
    PREFIX,
    PROMPT,
    TOP,
    Recipe,
    Saving,
)

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"fused": True}),  # a seventh of the time of the default
    "sgd": (torch.optim.SGD, {"fused": True}),
}
PROFILE_RATE = 1e-4
"""Of the steps that importances are of; being shares, they do not depend on it."""
AFTER_LAYERS = r"\b(pooler|classifier|score|norm|ln_f|final_layer_norm|lm_head)\b"
"""What comes after the last layer, by names in transformers' models."""

Groups = list[dict[str, Any]]


@dataclass
class Setup:
    """What takes steps.

    Attributes:
        model: a copy of the problem's, on the CPU, in training mode.
        optimizer: of what trains.
        loss: of a batch: the mean, or (B,) where directions are per example.
        tensors: names of what is first-order.
        predicted: what the partition says that it costs; empty where there is none.
    """

    model: nn.Module
    optimizer: HybridZOFO
    loss: Callable[[Batch], Tensor]
    tensors: list[str]
    predicted: dict[str, float]

    def step(self, batch: Batch) -> Tensor:
        """One of the optimizer."""
        self.optimizer.zero_grad()
        loss: Tensor = self.optimizer.step(lambda: self.loss(batch))
        return loss

    def count(self, mode: str) -> int:
        """Elements of the parameters of a mode."""
        return sum(p.numel() for p in trained_parameters(self.optimizer.param_groups, mode))


def set_up(
    problem: Problem,
    recipe: Recipe,
    *,
    lr_fo: float | None,
    lr_zo: float | None,
    seed: int,
    batches: Sequence[Batch] = (),
    saving: Saving = PLAIN,
    partitions: Path | None = None,
) -> Setup:
    """
    Args:
        lr_fo, lr_zo: learning rates; None where there is nothing of this order.
        seed: of the adapter and of the directions.
        batches: of training examples, on which a partition is chosen; needed for one.
        saving: of memory.
        partitions: folder that keeps partitions by recipe and seed, for the same batches.

    Raises:
        ModelError: the model has no such part.
        ValueError: rates are missing, or there are no batches for a partition.
    """
    for name, rate, needed in (("lr_fo", lr_fo, recipe.first), ("lr_zo", lr_zo, recipe.kind)):
        if (rate is not None) != bool(needed):
            raise ValueError(f"{name} must be a rate where it is used, else None, got {rate!r}")
    torch.manual_seed(seed)
    zo = None if lr_zo is None else {"lr": lr_zo, "mu": MU}
    fo = {} if lr_fo is None else {"lr": lr_fo}
    kind = KINDS.get(recipe.kind, {})
    predicted: dict[str, float] = {}
    if recipe.first == PARTITION:
        model: nn.Module = copy.deepcopy(problem.base)
        model.requires_grad_(True)
        file = None if partitions is None else partitions / f"{_stem(recipe, saving)}-{seed}.json"
        partition = _partition(problem, model, recipe, saving, batches, file)
        groups = list(partition.groups(model, zo, fo, verbose=False))
        predicted = _predicted(partition)
        if not recipe.kind:
            groups = [group for group in groups if group["mode"] == "fo"]
        _freeze_others(model, groups)
    elif recipe.first in (HEAD, TOP):
        model, groups = _top(problem, recipe, zo, fo)
    else:
        method = _METHOD[recipe.first, recipe.kind != FROZEN]
        layers = _top_layers(problem, recipe.layers) if recipe.layers else ()
        model, groups = prepare(
            METHODS[method],
            problem,
            AdapterOptions(layers=layers),
            zo=zo or {},
            fo=fo,
            include=INCLUDED.get(recipe.kind, ()),
            directions=_directions(recipe),
        )
    if saving.checkpointed:
        part: Any = model
        part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    fo_optimizer, options = OPTIMIZERS[recipe.optimizer]
    optimizer = HybridZOFO(
        groups,
        estimator="one_sided" if recipe.is_hybrid else "two_sided",
        seed=seed,
        fo_optimizer=fo_optimizer,
        weight_decay=0,
        coupling=recipe.coupling,
        optimizer_in_backward=saving.in_backward,
        nonfinite="raise" if saving.in_backward else "skip",
        **kind,
        **(options if recipe.first else {}),
    )

    def loss(batch: Batch) -> Tensor:
        losses = problem.train.losses(model, batch)
        return losses if recipe.kind == PER_EXAMPLE else losses.mean()

    tensors = [name for g in groups if g["mode"] == "fo" for name in g["param_names"]]
    return Setup(model, optimizer, loss, tensors, predicted)


_METHOD = {
    ("", True): "zo",
    (ALL, False): "fo",
    (LORA, False): "fo-lora",
    (LORA, True): "hybrid-lora",
    **{(name, False): f"fo-{name}" for name in (PROMPT, PREFIX)},
    **{(name, True): f"hybrid-{name}" for name in (PROMPT, PREFIX)},
}


def _top_layers(problem: Problem, count: int) -> tuple[int, ...]:
    there = problem.base.config.num_hidden_layers
    if count > there:
        raise ModelError(f"LoRA in the top {count} layers needs so many, the model has {there}")
    return tuple(range(there - count, there))


def _top(
    problem: Problem, recipe: Recipe, zo: Mapping[str, Any] | None, fo: Mapping[str, Any]
) -> tuple[nn.Module, Groups]:
    """The head, or the top layer and what comes after it, by first order."""
    model: nn.Module = copy.deepcopy(problem.base)
    model.requires_grad_(False)
    if recipe.first == HEAD:
        if problem.causal:
            raise ModelError("a causal language model has no head apart from its embeddings")
        head = last_linear(problem.base)[0]
        chosen = [name for name, _ in model.named_parameters() if name.startswith(f"{head}.")]
    else:
        (last,) = _top_layers(problem, 1)
        chosen = [name for name, _ in model.named_parameters() if _is_top(name, last)]
    for name in chosen:
        model.get_parameter(name).requires_grad_(True)
    groups = hybrid_param_groups(
        model,
        zo=zo,
        fo=fo,
        include=INCLUDED.get(recipe.kind, ()),
        directions=_directions(recipe),
        verbose=False,
    )
    return model, [g for g in groups if g["mode"] == "fo" or recipe.kind]


def _is_top(name: str, last: int) -> bool:
    layer = re.search(r"\b(?:layers?|h)\.(\d+)\.", name)
    return int(layer[1]) == last if layer else bool(re.search(AFTER_LAYERS, name))


def _stem(recipe: Recipe, saving: Saving) -> str:
    """Of a file with a partition: what it depends on."""
    parts = [recipe.of, f"{recipe.budget:g}", recipe.optimizer, _directions(recipe)]
    return "-".join(parts + ["in-backward"] * saving.in_backward)


def _directions(recipe: Recipe) -> str:
    return str(KINDS.get(recipe.kind, {}).get("directions", "shared"))


def _partition(
    problem: Problem,
    model: nn.Module,
    recipe: Recipe,
    saving: Saving,
    batches: Sequence[Batch],
    file: Path | None,
) -> Partition:
    """What is worth most within the budget by first order; from the file, if it is there."""
    if file is not None and file.is_file():
        return Partition.load(file)
    if not batches:
        raise ValueError("batches must be there for a partition, got none")
    model.train()
    closures = [lambda batch=batch: problem.train.losses(model, batch).mean() for batch in batches]
    fo_optimizer, options = OPTIMIZERS[recipe.optimizer]
    partition = make_partition(
        model,
        closures,
        fo={"lr": PROFILE_RATE, "weight_decay": 0.0, **options},
        budget=recipe.budget,
        of=recipe.of,
        fo_optimizer=fo_optimizer,
        optimizer_in_backward=saving.in_backward,
        directions=_directions(recipe),
        verbose=False,
    )
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partition.save(file)
    return partition


def _freeze_others(model: nn.Module, groups: Groups) -> None:
    """What is in no group: or the backward would pass errors on to it."""
    trained = {id(p) for group in groups for p in group["params"]}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def _predicted(partition: Partition) -> dict[str, float]:
    """Of the chosen tensors: shares of full first-order training's; and bytes at most, if known."""
    found = {
        "share of FLOPs": partition.flops / partition.full_flops,
        "share of memory": partition.bytes / partition.full_bytes,
    }
    if partition.peak is not None:
        found["peak MB"] = partition.peak / 1e6
    return found
