"""Which parameters of a transformers model change with its config, and along which dimension."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..sharding import is_sharded
from .bridge_config import Sizes


class Cut(NamedTuple):
    """A dimension of a parameter along which a smaller model has fewer elements."""

    dim: int
    part: str
    """What the dimension counts: ``"units"``, ``"queries"`` or ``"keys"``."""


def on_meta(model_class: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """A model without memory, which draws no random numbers."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))  # a model may complete it


def twin_of(large: Any) -> nn.Module:
    """The model of a large one's class and config on the meta device, of the same tensors.

    Raises:
        TypeError: it is no transformers model.
        ValueError: it has other tensors than its class and config say, such as an adapter's, or
            some that cannot be copied: quantised, sharded, or not in memory.
    """
    from transformers import PreTrainedModel

    kind = type(large).__name__
    if not isinstance(large, PreTrainedModel):
        raise TypeError(
            f"large must be a transformers model, got {kind}; merge an adapter first"
            " (merge_and_unload)"
        )
    if getattr(large.config, "quantization_config", None) is not None:
        raise ValueError(f"large must not be quantised, got {kind} with a quantization_config")
    twin = on_meta(type(large), large.config)
    ours, theirs = named_tensors(large), named_tensors(twin)
    for name in ours.keys() | theirs.keys():
        shapes = [tuple(of[name].shape) if name in of else None for of in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"large: {name} has the shape {shapes[0]}, but its class and config say"
                f" {shapes[1]}; merge an adapter first (merge_and_unload)"
            )
        if ours[name].is_meta or is_sharded(ours[name]):
            raise ValueError(f"large: {name} must be in memory whole, got one sharded or on meta")
    for name, parameter in large.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(f"large: {name} must be of floating point, got {parameter.dtype}")
    return twin


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by every name they have, and buffers."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and what it calls it."""
    owner, _, last = name.rpartition(".")
    return model.get_submodule(owner), last


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer, (outputs, inputs); a view."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(module) else weight


def side_of(module: nn.Module, tensor: str, dim: int) -> str | None:
    """The side of a linear layer that a dimension of its tensor is of; None: not understood."""
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return None
    if tensor == "bias":
        return "output"
    return ("output", "input")[dim ^ is_conv1d(module)] if tensor == "weight" else None


def cuts_between(large: nn.Module, small: nn.Module, sizes: Sizes, changed: str) -> dict[str, Cut]:
    """Where a model of the same layers has other shapes.

    Args:
        large, small: of one class; on the meta device.
        sizes: of the parts that differ.
        changed: the argument that asks for it, for messages.

    Returns:
        By name, what is cut of weights and biases of linear layers.

    Raises:
        ValueError: a tensor differs in another way, or none does.
    """
    cuts = {}
    theirs = named_tensors(small)
    for name, tensor in named_tensors(large).items():
        ours, other = tuple(tensor.shape), tuple(theirs[name].shape)
        if ours == other:
            continue
        pairs = enumerate(zip(ours, other, strict=False))
        found = [
            Cut(dim, part)
            for dim, pair in pairs
            for part, size in sizes.items()
            if pair == size[:2] and ours[:dim] + ours[dim + 1 :] == other[:dim] + other[dim + 1 :]
        ]
        owner, last = place_of(large, name)
        if not found or side_of(owner, last, found[0].dim) is None:
            raise ValueError(
                f"{changed}: {name} of {type(owner).__name__} changes from {ours} to {other}, which"
                " is not the side of a linear layer with one column or row for each unit: it"
                " cannot be cut"
            )
        cuts[name] = found[0]
    if not cuts:
        raise ValueError(f"{changed}: no parameter of {type(large).__name__} depends on it")
    return cuts


def projections(model: nn.Module, cuts: Mapping[str, Cut], part: str) -> dict[str, nn.Module]:
    """The linear layers whose inputs are a part, by name."""
    found = {}
    for name, cut in cuts.items():
        owner, last = place_of(model, name)
        if cut.part == part and side_of(owner, last, cut.dim) == "input":
            found[name.rpartition(".")[0]] = owner
    return found


def check_alike(
    large: nn.Module,
    small: nn.Module,
    where: str,
    kinds: tuple[type, ...] = (bool, float, str),
    besides: str | None = None,
) -> None:
    """That modules of a smaller model compute as those of the large one that they come from.

    Modules may differ in more than their weights: a scale by depth, a kind of attention.

    Args:
        large, small: modules whose parts should have the same names, classes and parameters.
        where: their names, for messages.
        kinds: of plain attributes that must be equal, but for the index of a layer.
        besides: the name of a part that is left out.

    Raises:
        ValueError: naming the module and what differs.
    """
    ours, theirs = _parts(large, besides), _parts(small, besides)
    for name in {**ours, **theirs}:
        both = ours.get(name), theirs.get(name)
        kind, other_kind = (_kind(module) for module in both)
        if kind != other_kind:
            raise ValueError(
                f"{where}: {name or 'it'} is {kind} in the large model, but {other_kind} in the"
                " bridge"
            )
        values, others = (vars(module) for module in both)
        for key, value in values.items():
            index = key.startswith("layer") and type(value) is int
            # what only left-out layers need may be missing
            if type(value) in kinds and not index and others.get(key, value) != value:
                raise ValueError(
                    f"{where}: {name or 'it'} has {key} = {value!r} in the large model, but"
                    f" {others[key]!r} in the bridge, where it would compute something else"
                )


def _parts(model: nn.Module, besides: str | None) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if besides is None or not f"{name}.".startswith(f"{besides}.")
    }


def _kind(module: nn.Module | None) -> str:
    """A module's class, and what parameters it has of its own."""
    if module is None:
        return "missing"
    names = ", ".join(name for name, _ in module.named_parameters(recurse=False))
    return f"{type(module).__name__}{names and f' with {names}'}"
