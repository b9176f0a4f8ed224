"""Tiny configurations: fields are made small by their names and kinds, also in nested ones.

A configuration is read as a dictionary, its fields are replaced by the first rule whose pattern
fits the whole name, and it is made anew, so that whatever follows from its fields follows again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .field_rules import PATTERNS
from .fields import KINDS, SPECIAL, is_list, kept_layers

TOKEN = re.compile(r"\w*_token_ids?|\w*_token_index|\w+_id|\w*_index")
FOLLOWING = ("_out_features", "_out_indices", "stage_names", "down_ops")
"""Fields that follow from others, and are left out."""
NOT_TOKENS = ("lang_id", "active_idx")


def shrunk(config: Mapping[str, Any], tokens: dict[int, int] | None = None) -> dict[str, Any]:
    """The fields of a tiny configuration.

    Args:
        config: fields, as ``config.to_dict()`` gives them.
        tokens: the new number of each special token that was renumbered, filled by this call.
    """
    tokens = {} if tokens is None else tokens
    small: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            labels = isinstance(key, str) and (key.endswith("2id") or key.startswith("id2"))
            small[key] = value if labels else shrunk(value, tokens)
            if str(key).endswith("backbone_config"):
                _keep_outputs(value, small[key])
        elif key in FOLLOWING:
            continue
        elif key in ("out_features", "out_indices"):
            small[key] = None
        elif not isinstance(key, str):
            small[key] = value
        elif TOKEN.fullmatch(key) and key not in NOT_TOKENS:
            small[key] = _token(value, tokens)
        else:
            small[key] = _by_name(key, value, config)
    if "num_hidden_layers" in small and isinstance(small["num_hidden_layers"], int):
        _cut_lists(config, small)
    return small


def _keep_outputs(config: Mapping[str, Any], small: dict[str, Any]) -> None:
    """A backbone gives as many maps of features as it did, of layers or stages that are there."""
    names = config.get("out_features")
    if not names or not isinstance(names, (list, tuple)):
        return
    if "num_hidden_layers" in small:
        small["num_hidden_layers"] = max(2, len(names))
        names = [f"stage{number}" for number in range(1, len(names) + 1)]
    small["out_features"] = list(names)


def _token(value: Any, tokens: dict[int, int]) -> Any:
    """A special token's number: kept where it is small, else the next that is free."""
    if isinstance(value, (list, tuple)):
        return [_token(part, tokens) for part in value]
    if isinstance(value, bool) or not isinstance(value, int) or value < SPECIAL // 4:
        return value
    return tokens.setdefault(value, SPECIAL // 4 + len(tokens) % (3 * SPECIAL // 4))


def _by_name(key: str, value: Any, config: Mapping[str, Any]) -> Any:
    for pattern, rule in PATTERNS:
        if pattern.fullmatch(key):
            return rule(value, config)
    return value


def _cut_lists(config: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Other lists of an entry for each layer are as long as there are layers."""
    kept = kept_layers(config)
    for key, value in config.items():
        if isinstance(value, (list, tuple)) and key not in KINDS and is_list(small.get(key)):
            if len(value) == len(small[key]) == config["num_hidden_layers"]:
                small[key] = [small[key][layer] for layer in kept]
        elif isinstance(value, Mapping) and value and all(_is_number(part) for part in value):
            small[key] = {
                number: _of_layer(small[key], layer)
                for number, layer in enumerate(kept)
                if _of_layer(small[key], layer) is not None
            }


def _is_number(key: Any) -> bool:
    return isinstance(key, int) or str(key).isdigit()


def _of_layer(fields: Mapping[Any, Any], layer: int) -> Any:
    return fields.get(layer, fields.get(str(layer)))
