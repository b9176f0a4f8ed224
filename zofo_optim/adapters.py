"""Which parameters of a model are its adapters', and so saved by those who made them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn


def adapter_parameters(
    model: nn.Module, names_of_peft: Collection[str] | None = None
) -> Iterator[Tensor]:
    """Of peft's adapters of these names, of bottlenecks, and of heads that are saved with them.

    Without names, of all of peft's, active or not. Where peft's model is around one with
    bottlenecks, those are a part of its base model.
    """
    for module in model.modules():
        names = getattr(module, "adapter_layer_names", ())  # of peft's layers
        if hasattr(type(module), "active_peft_config"):  # peft's models, and no base model
            names = ("prompt_encoder",) if "prompt_encoder" in dict(module.named_children()) else ()
        for name in names:
            part: Any = getattr(module, name, None)
            parts: list[Any] = [part]
            if names_of_peft is not None and isinstance(part, nn.ModuleDict | nn.ParameterDict):
                parts = [part[adapter] for adapter in names_of_peft if adapter in part]
            for one in parts:
                if isinstance(one, nn.Module):
                    yield from one.parameters()
                elif isinstance(one, nn.Parameter):
                    yield one
    if has_bottlenecks(model):
        from .transfer.bottlenecks import owners_of

        for owner in owners_of(model).values():
            yield from owner.parameters()


def has_bottlenecks(model: nn.Module) -> bool:
    """Whether it is the model that ``add_bottlenecks`` changed, not peft's around it."""
    return "bottlenecks" in vars(model)
