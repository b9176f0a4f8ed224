"""Configs of smaller models with the hidden size of a large one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim", "ffn_hidden_size")
"""What configs call the inner width of a feed-forward."""


class Size(NamedTuple):
    """Of a part of each layer that is cut."""

    large: int
    """Elements in the large model,"""
    small: int
    """in the smaller one,"""
    group: int
    """and of neighbours that stay or go together."""


Sizes = dict[str, Size]
"""By part: ``"units"`` of the feed-forward, ``"queries"`` and ``"keys"``: units of all heads."""


def chosen_layers(layers: Any, count: int) -> list[int] | None:
    """Indices of layers where they were given, checked; None: a number of them is.

    Raises:
        TypeError, ValueError: naming ``layers``.
    """
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        check_count("layers", layers, count)
        return None
    indices = list(layers)
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in indices):
        raise TypeError(f"layers must be an int or ascending indices, got {indices}")
    rising = all(first < second for first, second in pairwise(indices))
    if not indices or not rising or indices[0] < 0 or indices[-1] >= count:
        raise ValueError(
            f"layers must be ascending indices below {count}, at least one, got {indices}"
        )
    return indices


def check_count(name: str, value: Any, most: int) -> None:
    """That it is an int from 1 to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not 1 <= value <= most:
        raise ValueError(f"{name} must be from 1 to {most}, got {value}")


def with_layers(config: Any, layers: Sequence[int], count: int) -> Any:
    """The config of a model with some of the layers; lists by layer are cut too."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = len(layers)
    for key, value in list(vars(small).items()):
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == count:
            setattr(small, key, [value[layer] for layer in layers])
    return small


def check_plain(config: Any) -> None:
    """That it is the config of the layers itself.

    Raises:
        ValueError: it has theirs in it, beside those of other parts.
    """
    kind = type(config).__name__
    if config.get_text_config() is not config:
        raise ValueError(
            f"large must be one model of text, got one with a {kind}, which has configs of its "
            "parts; take the language model in it"
        )


def inner_width(config: Any) -> int | None:
    """The inner width of the feed-forward; None: not known by name."""
    key = _width_key(config)
    if key is None:
        return None
    width: int = getattr(config, key) or 4 * config.hidden_size  # None in GPT-2
    return width


def _width_key(config: Any) -> str | None:
    return next((key for key in WIDTHS if hasattr(config, key)), None)


def with_units(config: Any, units: Any) -> tuple[Any, Sizes]:
    """The config of a model with fewer inner units of the feed-forward; no sizes: as many.

    Raises:
        TypeError, ValueError: ``units`` is neither a share in (0, 1] nor such a number; or the
            config has no inner width by a known name.
    """
    key, width = _width_key(config), inner_width(config)
    if key is None or width is None:
        raise ValueError(
            f"units={units!r}: {type(config).__name__} has none of {', '.join(WIDTHS)}: the inner"
            " width of its feed-forward cannot be changed"
        )
    if isinstance(units, float):
        if not 0 < units <= 1:
            raise ValueError(f"units must be a share in (0, 1] or a number, got {units}")
        units = max(1, round(units * width))
    check_count("units", units, width)
    small = copy.deepcopy(config)
    setattr(small, key, units)
    return small, {"units": Size(width, units, 1)} if units < width else {}


def with_heads(config: Any, heads: Any) -> tuple[Any, Sizes]:
    """The config of a model with fewer heads of keys and values, and their query heads.

    Raises:
        TypeError, ValueError: ``heads`` is no such number; or the size of a head follows from the
            number of heads.
    """
    # a property would follow the number of heads
    size = vars(config).get("head_dim")
    if not isinstance(size, int):
        raise ValueError(
            f"heads must not be given where the config has no head_dim of its own, as "
            f"{type(config).__name__}: with fewer heads each would be wider; got {heads!r}"
        )
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    check_count("heads", heads, keys)
    group = queries // keys
    small = copy.deepcopy(config)
    small.num_attention_heads, small.num_key_value_heads = heads * group, heads
    small.head_dim = size
    sizes = {
        "queries": Size(queries * size, heads * group * size, group * size),
        "keys": Size(keys * size, heads * size, size),
    }
    return small, sizes if heads < keys else {}


def check_loads(config: Any, asked: str) -> None:
    """That the config of a bridge would be the same when it is saved and read again.

    Raises:
        ValueError: its class does not accept what was asked for, and why; or changes it.
    """
    kind, written = type(config).__name__, config.to_dict()
    try:
        read = type(config).from_dict(config.to_dict()).to_dict()
    except Exception as error:  # of many kinds, by version
        raise ValueError(f"{asked} is refused by {kind}: {error}") from error
    changed = [key for key in written if read.get(key) != written[key]]
    if changed:
        raise ValueError(f"{asked}: {kind} would be read with another {', '.join(changed)}")
