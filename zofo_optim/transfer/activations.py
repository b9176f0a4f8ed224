"""Rows of activations of a model on unlabelled text, at the same places for every model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bottlenecks import without_bottlenecks
from .projections import Rows

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
        TypeError: a batch is not a mapping with token ids.
    """
    found = []
    for batch in batches:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise TypeError(
                "batches must be mappings with input_ids, a tensor (texts, tokens), as a tokenizer "
                f"with return_tensors='pt' makes them, got {type(batch).__name__}"
            )
        found.append({name: value for name, value in batch.items() if name != "labels"})
    return found


def positions(batches: Sequence[Mapping[str, Any]], tokens: int, seed: int) -> list[Positions]:
    """At most so many tokens of the batches, drawn by the seed; padding is never taken.

    Raises:
        ValueError: there are too few texts to hold one out.
    """
    masks = []
    for batch in batches:
        mask = batch.get("attention_mask")
        ones = torch.ones(batch["input_ids"].shape, dtype=torch.bool)
        masks.append(ones if mask is None else mask.detach().cpu().bool())
    texts = sum(len(mask) for mask in masks)
    if texts < HELD:
        raise ValueError(
            f"batches must have at least {HELD} texts, as one in {HELD} is held out, got {texts}"
        )
    count = int(sum(mask.sum() for mask in masks))
    chosen = torch.zeros(count, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    chosen[torch.randperm(count, generator=generator)[:tokens]] = True
    found, text, token = [], 0, 0
    for mask in masks:
        taken = torch.zeros_like(mask)
        here = int(mask.sum())
        taken[mask] = chosen[token : token + here]
        held = torch.arange(text, text + len(mask)) % HELD == HELD - 1
        found.append(Positions(taken, held))
        text, token = text + len(mask), token + here
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device


def record(
    model: nn.Module,
    taps: Iterable[Tap],
    batches: Sequence[Mapping[str, Any]],
    places: Sequence[Positions],
) -> dict[Tap, Rows]:
    """Rows at the taps: of the tokens that are taken; of all texts where a module has one row each.

    Forward passes alone, without a graph, in evaluation mode, without adapters. Memory: that of
    one forward pass on the model's device; rows are kept on the CPU, in float32.

    Raises:
        ValueError: a module has no such activation, or not once a batch.
    """
    wanted = list(dict.fromkeys(taps))
    found: dict[Tap, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    with _hooked(model, wanted) as seen:
        for batch, place in zip(batches, places, strict=True):
            seen.clear()
            forward(plain(model), batch)
            for tap in wanted:
                if len(seen[tap]) != 1:
                    raise ValueError(
                        f"module {tap.module!r} must be used once in a forward pass to be mapped, "
                        f"got {len(seen[tap])} times"
                    )
                for rows, new in zip(found[tap], taken(tap, seen[tap][0], place), strict=True):
                    rows.append(new)
    return {tap: Rows(torch.cat(found[tap][0]), torch.cat(found[tap][1])) for tap in wanted}


def forward(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Any:
    """One forward pass without a graph, on the model's device, in evaluation mode."""
    device = device_of(model)
    moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}
    with torch.no_grad():
        return model(**moved, **options)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no adapter, and no parameter that requires gradients; then as before."""
    training = {module: module.training for module in model.modules()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            model.eval()
            stack.enter_context(without_bottlenecks(model))
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


@contextmanager
def _hooked(model: nn.Module, taps: Sequence[Tap]) -> Iterator[dict[Tap, list[Tensor]]]:
    """Collects what passes the taps."""
    modules = dict(plain(model).named_modules())
    seen: dict[Tap, list[Tensor]] = defaultdict(list)

    def taking(tap: Tap) -> Callable[..., None]:
        def take(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
            value = (*args, *kwargs.values()) if tap.side == "input" else output
            seen[tap].append(_first(value, tap))

        return take

    with ExitStack() as stack:
        for tap in taps:
            module = modules.get(tap.module)
            if module is None:
                raise ValueError(
                    f"{type(plain(model)).__name__} must have the module {tap.module!r}"
                )
            register: Any = (
                module.register_forward_pre_hook
                if tap.side == "input"
                else module.register_forward_hook
            )
            stack.callback(register(taking(tap), with_kwargs=True).remove)
        yield seen


def plain(model: nn.Module) -> nn.Module:
    """The model within peft's, whose modules have the names that they have without."""
    inner: Any = getattr(model, "get_base_model", None)
    found: nn.Module = model if inner is None else inner()
    return found


def _first(value: Any, tap: Tap) -> Tensor:
    for part in value if isinstance(value, list | tuple) else (value,):
        if isinstance(part, Tensor):
            return part.detach()
    raise ValueError(f"module {tap.module!r} must have a tensor as {tap.side}, got none")


def taken(tap: Tap, value: Tensor, place: Positions) -> tuple[Tensor, Tensor]:
    """The rows of a batch's activation, to fit on and held out."""
    texts, length = place.tokens.shape
    if value.dim() == 2 and len(value) == texts * length:
        value = value.reshape(texts, length, value.shape[1])
    if value.shape[:2] == (texts, length) and value.dim() == 3:
        held = place.held[:, None].expand(texts, length)
        parts = (place.tokens & ~held, place.tokens & held)
    elif value.dim() == 2 and len(value) == texts:
        parts = (~place.held, place.held)
    else:
        raise ValueError(
            f"module {tap.module!r} must have an {tap.side} of shape ({texts}, {length}, width) or "
            f"({texts}, width), got {tuple(value.shape)}"
        )
    fitted, held_out = (value[part.to(value.device)].float().cpu() for part in parts)
    return fitted, held_out
