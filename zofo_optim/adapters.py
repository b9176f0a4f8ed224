"""Which parameters of a model are its adapters', and so saved by those who made them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def adapter_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Of peft's adapters, active or not, of bottlenecks, and of heads that are saved with them.

    Where peft's model is around one with bottlenecks, those are a part of its base model.
    """
    for module in model.modules():
        names = getattr(module, "adapter_layer_names", ())  # of peft's layers
        if hasattr(type(module), "active_peft_config"):  # peft's models, and no base model
            names = ("prompt_encoder",) if "prompt_encoder" in dict(module.named_children()) else ()
        for name in names:
            part: Any = getattr(module, name, None)
            if isinstance(part, nn.Module):
                yield from part.parameters()
            elif isinstance(part, nn.Parameter):
                yield part
    if has_bottlenecks(model):
        from .transfer.bottlenecks import owners_of

        for owner in owners_of(model).values():
            yield from owner.parameters()


def has_bottlenecks(model: nn.Module) -> bool:
    """Whether it is the model that ``add_bottlenecks`` changed, not peft's around it."""
    return "bottlenecks" in vars(model)
