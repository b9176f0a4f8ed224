"""Small models: some layers of a large one, with all its widths, as a model of their own."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ..models import ModelError

LAYER = re.compile(r"\b(layers?|h)\.(\d+)\.")
"""A layer's number in the names of transformers' models."""


def evenly(count: int, of: int) -> tuple[int, ...]:
    """So many of all layers, the first and the last among them, evenly spaced.

    Raises:
        ModelError: there are not so many, or fewer than two are asked for.
    """
    if not 2 <= count <= of:
        raise ModelError(f"a slice must have 2 to {of} layers, got {count}")
    return tuple(round(place * (of - 1) / (count - 1)) for place in range(count))


def sliced(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model of these layers alone, in this order, with memory of its own.

    Raises:
        ModelError: the model has no such layer.
    """
    there = model.config.num_hidden_layers
    if not layers or min(layers) < 0 or max(layers) >= there:
        raise ModelError(f"layers must be some of 0 to {there - 1}, got {list(layers)}")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    kind: Any = type(model)
    small: PreTrainedModel = kind(config).to(dtype=model.dtype)
    weights = model.state_dict()

    def of_large(name: str) -> str:
        return LAYER.sub(lambda found: f"{found[1]}.{layers[int(found[2])]}.", name, count=1)

    small.load_state_dict({name: weights[of_large(name)] for name in small.state_dict()})
    return small
