"""Unlabelled text for every model: which tokens are taken, and passes without a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..names import within_peft
from .bottlenecks import without_bottlenecks
from .intact import input_gradients_off

HELD = 4
"""One text in so many is held out."""


class Tap(NamedTuple):
    """A place in a model."""

    module: str
    """Its name, without the parts of wrappers."""
    side: str
    """"input" or "output" of the module; "keys" or "values" that a layer has cached."""


class Positions(NamedTuple):
    """Which rows are taken of a batch of B texts of T tokens."""

    tokens: Tensor
    """(B, T), bool: tokens that are taken."""
    held: Tensor
    """(B,), bool: texts that are held out."""


def inputs_of(batches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The batches without labels.

    Raises:
        TypeError: a batch is not a mapping with token ids, a tensor.
        ValueError: token ids are not (texts, tokens).
    """
    found = []
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(
                "batches must be mappings with input_ids, a tensor (texts, tokens), as a tokenizer "
                f"with return_tensors='pt' makes them, got {type(batch).__name__}"
            )
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor):
            raise TypeError(
                "batches must have input_ids that are a tensor (texts, tokens), as a tokenizer "
                f"with return_tensors='pt' makes it, got {type(ids).__name__}"
            )
        if ids.ndim != 2:
            raise ValueError(
                f"batches must have input_ids of shape (texts, tokens), got {tuple(ids.shape)}"
            )
        found.append({name: value for name, value in batch.items() if name != "labels"})
    return found


def real_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Which tokens of a batch are not padding: (texts, tokens), bool, on the CPU.

    Raises:
        ValueError: the mask is not one of tokens.
    """
    shape, mask = batch["input_ids"].shape, batch.get("attention_mask")
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"batches must have attention_mask of shape (texts, tokens), got {got} with input_ids "
            f"of {tuple(shape)}"
        )
    return mask.detach().cpu().bool()


def positions(batches: Sequence[Mapping[str, Any]], tokens: int, seed: int) -> list[Positions]:
    """At most so many tokens of the batches, drawn by the seed; padding is never taken.

    One text in four is held out, drawn too: of those of which tokens are taken, and of the others.

    Raises:
        ValueError: there are too few texts to hold one out, or no tokens; or a mask is of no use.
    """
    masks = [real_tokens(batch) for batch in batches]
    texts = sum(len(mask) for mask in masks)
    if texts < HELD:
        raise ValueError(
            f"batches must have at least {HELD} texts, as one in {HELD} is held out, got {texts}"
        )
    count = int(sum(mask.sum() for mask in masks))
    if not count:
        raise ValueError("batches must have at least one token that is not padding, got none")
    chosen = torch.zeros(count, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    chosen[torch.randperm(count, generator=generator)[:tokens]] = True
    taken = [torch.zeros_like(mask) for mask in masks]
    parts = torch.split(chosen, [int(mask.sum()) for mask in masks])
    for part, mask, new in zip(taken, masks, parts, strict=True):
        part[mask] = new
    drawn = torch.randperm(texts, generator=generator)
    some = torch.cat([part.any(1) for part in taken])[drawn]
    order = torch.cat([drawn[some], drawn[~some]])
    held = torch.zeros(texts, dtype=torch.bool)
    held[order[: texts // HELD * HELD : HELD]] = True
    sizes = [len(mask) for mask in masks]
    return [Positions(*both) for both in zip(taken, torch.split(held, sizes), strict=True)]


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device


def forward(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Any:
    """One forward pass without a graph, on the model's device, in evaluation mode."""
    device = device_of(model)
    moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}
    with torch.no_grad():
        return model(**moved, **options)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no adapter, and nothing that requires gradients; then as before."""
    training = {module: module.training for module in model.modules()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            model.eval()
            stack.enter_context(without_bottlenecks(model))
            stack.enter_context(input_gradients_off(within_peft(model)))
            peft: Any = model
            # virtual tokens are no part of the plain model
            if hasattr(peft, "peft_config") and not peft.active_peft_config.is_prompt_learning:
                stack.enter_context(peft.disable_adapter())
            model.requires_grad_(False)
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for p, flag in flags:  # peft lets an adapter train that is switched on again
            p.requires_grad_(flag)
