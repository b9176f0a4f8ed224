"""Keys and values of a model's attention on text: where the virtual tokens of a prefix live."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..names import within_peft
from .activations import Positions, Tap, at_rest, forward
from .layers import stack_of
from .projections import Rows
from .recording import joined, taken

KEYS, VALUES = "keys", "values"
CACHED = (KEYS, VALUES)
"""Sides of taps that name a layer, and stand for what that caches."""


def record_cache(
    model: nn.Module,
    taps: Iterable[Tap],
    batches: Sequence[Mapping[str, Any]],
    places: Sequence[Positions],
) -> dict[Tap, Rows]:
    """As :func:`record`, of taps on the sides "keys" and "values" of layers.

    Rows are as the model caches them, after rotary embedding where it has that: those of all heads
    of keys and values side by side, (n, heads * head_dim). An empty cache is given to the model,
    which it extends; that is how peft gives it a prefix, so encoders that take prefixes do it too.

    Memory: keys and values of one batch, of all layers, on the model's device.

    Raises:
        ValueError: the model does not take a cache.
    """
    wanted = list(dict.fromkeys(taps))
    stack = stack_of(within_peft(model))
    found: dict[Tap, list[tuple[Tensor, Tensor]]] = {tap: [] for tap in wanted}
    for batch, place in zip(batches, places, strict=True) if wanted else ():
        if not place.tokens.any():
            continue
        cache = _cached(model, batch, stack.size)
        for tap in wanted:
            inside = stack.split(tap.module)
            assert inside is not None
            rows = cache[inside[0]][tap.side].transpose(1, 2).flatten(2)
            found[tap].append(taken(tap, rows, place))
    return joined(found)


def cache_shape(model: nn.Module) -> tuple[int, int]:
    """How many heads of keys and values each layer has, and their width; runs one token.

    Raises:
        ValueError: the model does not take a cache, or layers differ.
    """
    stack = stack_of(within_peft(model))
    one = dict.fromkeys(("input_ids", "attention_mask"), torch.ones(1, 1, dtype=torch.int64))
    with at_rest(model):
        cache = _cached(model, one, stack.size)
    shapes = [tuple(t.shape[1::2]) for layer in cache for t in layer.values()]
    for place, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"layer {stack.layer(place // 2)!r} cannot be mapped: peft gives all layers of a "
                f"model prefixes of one shape, but its {CACHED[place % 2]} have (heads, width) = "
                f"{shape}, and those of the first layer {shapes[0]}"
            )
    heads, width = shapes[0]
    return heads, width


def _cached(model: nn.Module, batch: Mapping[str, Any], count: int) -> list[dict[str, Tensor]]:
    """Of each layer keys and values, (texts, heads, tokens, width)."""
    from transformers.cache_utils import DynamicCache

    whole: Any = within_peft(model)
    body = whole.base_model  # without a head, whose logits are large
    if "past_key_values" not in inspect.signature(body.forward).parameters:
        raise ValueError(
            f"{type(body).__name__} must take past_key_values for a prefix to be carried, and does "
            "not"
        )
    cache = DynamicCache()
    forward(body, batch, past_key_values=cache, use_cache=True)
    found = [{side: getattr(layer, side, None) for side in CACHED} for layer in cache.layers]
    if len(found) != count or any(t is None for layer in found for t in layer.values()):
        raise ValueError(
            f"{type(body).__name__} must cache keys and values in each of its {count} layers for a "
            f"prefix to be carried, got {len(found)} that do"
        )
    return found  # type: ignore[return-value]
