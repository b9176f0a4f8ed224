"""Which modules can have a bottleneck adapter, how wide it is there, and where it lives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..adapters import adapter_parameters

CHILD = "bottleneck"
"""What an adapter is called in the module that it follows."""
_WIDTHS = ("out_features", "nf", "embedding_dim", "normalized_shape")
"""Attributes that say how wide a module's output is: Linear, Conv1D, Embedding, LayerNorm."""


def check_bare(model: nn.Module) -> None:
    """That a model has no adapter yet.

    Raises:
        ValueError: it has.
    """
    if hasattr(model, "bottlenecks"):
        raise ValueError("model must have no bottlenecks yet, as one model holds one set of them")
    if hasattr(model, "peft_config") or any(True for _ in adapter_parameters(model)):
        raise ValueError(
            "model must have no adapter of peft, which would be frozen and not be carried: call "
            "model.merge_and_unload() or model.unload() first, and take what that returns"
        )


def targets_of(model: nn.Module, wanted: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules whose names match, by name.

    Raises:
        ValueError: there is none.
    """
    named = dict(model.named_modules())
    found = {name: module for name, module in named.items() if name and matches(wanted, name)}
    if not found:
        raise ValueError(
            f"target_modules must match modules of the model, got {wanted!r}, which match none; "
            f"the last one's name is {list(named)[-1]!r}"
        )
    return found


def matches(wanted: str | Sequence[str], name: str) -> bool:
    """Whether a name is one of those, or ends so; or a regular expression matches all of it."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def check_trainable(modules: Mapping[str, nn.Module]) -> None:
    """That modules to save can require gradients.

    Raises:
        ValueError: one cannot.
    """
    for name, module in modules.items():
        for weight in module.parameters():
            if not weight.is_floating_point():
                raise ValueError(
                    "modules_to_save must name modules of floating point, as they train, got "
                    f"{name!r} of {weight.dtype}"
                )


def output_width(model: nn.Module, name: str, module: nn.Module) -> int:
    """How wide a module's output is, as far as one can tell without running it.

    Raises:
        ValueError: one cannot.
    """
    given = next((getattr(module, a) for a in _WIDTHS if hasattr(module, a)), None)
    if given is None:
        config: Any = getattr(model, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        given = getattr(config, "hidden_size", None)
    width = given[-1] if isinstance(given, tuple) else given
    if not isinstance(width, int):
        raise ValueError(
            f"target_modules must match modules whose output's width is known, got {name!r} "
            f"({type(module).__name__}), which has no out_features; name a Linear in it"
        )
    return width


def home_of(model: nn.Module, name: str, module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the adapter of a module.

    Raises:
        ValueError: the module cannot have one.
    """
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or hasattr(module, CHILD):
        raise ValueError(
            f"target_modules must not match {name!r}: a {type(module).__name__} cannot have a "
            f"child {CHILD!r}; name a module in it"
        )
    outer = model.get_submodule(name.rpartition(".")[0])
    if isinstance(outer, nn.MultiheadAttention):
        raise ValueError(
            f"target_modules must not match {name!r}: a MultiheadAttention takes its weights, and "
            "never calls it; name the attention"
        )
    like = next(iter([*module.parameters(), *model.parameters()]), torch.empty(0))
    full = like.is_floating_point() and like.dtype.itemsize >= torch.float32.itemsize
    return like.device, like.dtype if full else torch.float32
