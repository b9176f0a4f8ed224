"""What becomes of a field's value: sizes of a tiny model, and of its layers those that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

HIDDEN, HEADS, HEAD, LAYERS, VOCABULARY, POSITIONS = 32, 4, 8, 2, 128, 128
INNER, MOST_LAYERS = 48, 4
IMAGE, PATCH = 64, 16
EXPERTS = 4
SPECIAL = 48
"""Special tokens are below it, those of texts above."""

Rule = tuple[str, Callable[[Any, Mapping[str, Any]], Any]]


def to(size: int) -> Callable[[Any, Mapping[str, Any]], Any]:
    """An integer becomes ``size``, and so does each of a list; nothing grows."""

    def shrunk(value: Any, config: Mapping[str, Any]) -> Any:
        if isinstance(value, (list, tuple)):
            return [shrunk(part, config) for part in value]
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            return value
        return min(value, size)

    return shrunk


def fixed(size: Any) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Whatever it was, None and 0 apart."""
    return lambda value, config: value if value is None or value == 0 else size


def key_value_heads(value: Any, config: Mapping[str, Any]) -> Any:
    """As many as heads, one, or a half of them, as it was."""
    if value is None:
        return HEADS
    if not isinstance(value, int) or value <= 1:
        return value
    heads = config.get("num_attention_heads", config.get("n_heads", config.get("num_heads")))
    return HEADS if value == heads else HEADS // 2


def width(value: Any, config: Mapping[str, Any]) -> Any:
    """The widths of stages keep about their ratios, up to twice HIDDEN."""
    if isinstance(value, (list, tuple)):
        if not value or not all(isinstance(part, int) and part > 0 for part in value):
            return value
        least = min(value)
        return [min(2 * HIDDEN, HIDDEN // 2 * max(1, round(part / least))) for part in value]
    return to(HIDDEN)(value, config)


def layer_indices(value: Any, config: Mapping[str, Any]) -> Any:
    """Indices of layers that are there, and none twice."""
    layers = number_of_layers(config)
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-layers, min(value, layers - 1))
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, int) for part in value):
        return value
    return sorted({max(-layers, min(part, layers - 1)) for part in value})


def kept_layers(config: Mapping[str, Any]) -> list[int]:
    """The layers that a tiny model keeps, by their numbers: at least two, one of each kind.

    Lists of `KINDS` tell kinds apart; a kind is one combination of their entries.
    """
    lists = [value for key, value in config.items() if key in KINDS and is_list(value)]
    if not lists:
        return list(range(LAYERS))
    count = min(map(len, lists))
    first: dict[tuple[Any, ...], int] = {}
    for layer in range(count):
        first.setdefault(tuple(str(value[layer]) for value in lists), layer)
    kept = sorted(first.values())[:MOST_LAYERS]
    spare = [layer for layer in range(count) if layer not in kept]
    return sorted(kept + spare[: max(0, LAYERS - len(kept))])


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0


def number_of_layers(config: Mapping[str, Any]) -> int:
    return len(kept_layers(config))


KINDS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
    "attn_type_list",
    "hybrid_override_pattern",
    "ffn_types",
    "indexer_types",
    "compress_ratios",
    "mlp_types",
)
"""Lists of an entry for each layer: each kind is kept."""


def kinds(value: Any, config: Mapping[str, Any]) -> Any:
    return [value[layer] for layer in kept_layers(config)] if is_list(value) else value


def layers(value: Any, config: Mapping[str, Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return [layers(part, config) if is_list(part) else _one(part) for part in value]
    return to(number_of_layers(config))(value, config)


def _one(value: Any) -> Any:
    return 1 if isinstance(value, int) and not isinstance(value, bool) else value
