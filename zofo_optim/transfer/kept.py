"""What a bridge model kept of the large one, as its config says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bridge_config import inner_width

SIDES = ("input", "output")
"""The sides of a module: what goes in, what comes out."""


def bridge_of(config: Any) -> dict[str, Any] | None:
    """What :func:`bridge_model` wrote into a config; None: the model is no bridge."""
    return getattr(config, "bridge", None)


def sizes_of(config: Any) -> dict[str, Any]:
    """What tells a large model from others, as its bridges' configs have it, as ``"of"``."""
    heads = getattr(config, "num_attention_heads", None)
    return {
        "model": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden": getattr(config, "hidden_size", None),
        "units": inner_width(config),
        "heads": getattr(config, "num_key_value_heads", None) or heads,
    }


def check_made_of(config: Any, large: Any) -> None:
    """That the small model of this config, if it is a bridge, was made of a model like ``large``.

    Raises:
        ValueError: it was made of another one.
    """
    made_of = (bridge_of(config) or {}).get("of")
    if made_of is not None and made_of != sizes_of(large.config):
        raise ValueError(
            f"large must be the model of which bridge_model made small, with {made_of}, got one "
            f"with {sizes_of(large.config)}; to take small for a model of its own, delete "
            "config.bridge"
        )


def kept_layers(config: Any) -> dict[int, int] | None:
    """The layer of the bridge that each layer of the large model became; None: no bridge."""
    bridge = bridge_of(config)
    return None if bridge is None else {large: k for k, large in enumerate(bridge["layers"])}


def nearest_kept(kept: dict[int, int], count: int) -> dict[int, int]:
    """For each of so many layers of the large model, the bridge's that was nearest to it."""
    return {
        layer: kept[min(kept, key=lambda other: (abs(other - layer), other))]
        for layer in range(count)
    }


def kept_units(config: Any, module: str, side: str) -> Tensor | None:
    """Which units of one side of a large model's module a bridge kept.

    Args:
        config: of the bridge model.
        module: full name in the large model, such as ``model.layers.3.mlp.down_proj``.
        side: ``"input"`` or ``"output"``.

    Returns:
        Indices in ascending order, (kept,), int64; None: all were kept.

    Raises:
        ValueError: the side is unknown, or the bridge, which cut such modules, lacks that layer.
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}")
    bridge = bridge_of(config)
    for inner, cut in ({} if bridge is None else bridge["cut"]).items():
        outer = module.removesuffix(f".{inner}")
        layer = outer.rpartition(".")[2]
        if outer != module and layer.isdigit() and side in cut:
            return kept_part(config, int(layer), cut[side])
    return None


def kept_key_units(config: Any, layer: int) -> Tensor | None:
    """Which units of a large layer's keys and values a bridge kept, of all heads' together.

    As :func:`kept_units`; of the heads' units those of one head are neighbours.
    """
    bridge = bridge_of(config)
    return kept_part(config, layer, "keys") if bridge is not None and bridge["heads"] else None


def kept_part(config: Any, layer: int, part: str) -> Tensor:
    """The indices that a bridge kept in one large layer.

    Args:
        config: of the bridge model.
        layer: of the large model.
        part: ``"units"`` of the feed-forward; of attention ``"queries"``, units of all heads, or
            ``"keys"``, units of the heads of keys and values.

    Raises:
        ValueError: the bridge has no such layer.
    """
    bridge = config.bridge
    of_layers = bridge["units" if part == "units" else "heads"]
    if str(layer) not in of_layers:
        raise ValueError(
            f"layer {layer} of the large model is not in the bridge, which has {bridge['layers']}:"
            f" no {part} of it were chosen"
        )
    kept = torch.tensor(of_layers[str(layer)], dtype=torch.int64)
    if part == "units":
        return kept
    size = config.head_dim
    if part == "queries":
        keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size *= config.num_attention_heads // keys
    found: Tensor = (kept[:, None] * size + torch.arange(size)).flatten()
    return found
