"""Side updates: zeroth order for weights of any type, which are neither read nor written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..adapters import adapter_parameters
from ..names import matching, patterns_in, unwrapped, within_peft, without_layers
from ..sharding import is_sharded
from .bnb_4bit import settle_layer
from .refusals import is_quantised
from .side_module import NAME, SideUpdate, attach, detach, features_of

RANK = 16


def add_side_updates(
    model: nn.Module,
    *,
    rank: int = RANK,
    seed: int = 0,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
) -> dict[str, SideUpdate]:
    """Give linear layers an update of low rank beside their weight, for zeroth order to learn.

    A layer y = x W^T becomes y = x W^T + (x R) L^T, with L (m, r) zero at first, so that outputs
    are the same to the bit. R (n, r) is random, of ±1 / sqrt(r), and stays. L is a frozen
    parameter, ``NAME.side_update.left_seed_0`` for seed 0, which :func:`hybrid_param_groups` finds
    and zeroth order moves as any other: a displacement of L is one of low rank of W, exactly, and
    updates are kept in fp32. The weight may be of any type, and is not touched (Chen et al. 2024,
    LOZO, arXiv 2410.07698, sample one factor anew every some steps; here it stays).

    Memory: 4 r (m + n) bytes a layer. Cost of an evaluation: r (m + n) multiplications a token and
    layer, beside the layer's m n.

    Assumes that layers are called as modules; what reads a layer's weight otherwise, as
    ``MultiheadAttention`` does, does not see the update, and such layers are left out.

    Args:
        model: changed in place; also a peft model, whose base layers get the updates.
        rank: r, at least 1.
        seed: of R, in [0, 2**64). The same layer, rank and seed give the same R anywhere.
        include: patterns of names of layers, see :func:`hybrid_param_groups`; of all linear
            layers. Default: those whose weight is quantised.
        exclude: patterns of layers to leave out.

    Returns:
        What was added, by the layer's name.

    Raises:
        TypeError: ``model`` is no module, or patterns are no strings.
        ValueError: ``rank`` or ``seed`` is out of range, the model has side updates, a pattern
            matches no linear layer, no layer is left, or a weight is sharded or without data.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value, lowest, limit in (("rank", rank, 1, 2**31), ("seed", seed, 0, 2**64)):
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value < limit:
            raise ValueError(f"{name} must be an int in [{lowest}, {limit}), got {value!r}")
    if present := next(iter(side_updates(model)), None):
        raise ValueError(f"model must have no side updates yet, got one in {present!r}")
    return add_beside(model, _chosen(model, include, exclude), rank, seed)


def add_beside(
    model: nn.Module, layers: Mapping[str, nn.Module], rank: int, seed: int
) -> dict[str, SideUpdate]:
    """Give each of these layers of the model an update; all, or none where one raises."""
    sides, names = {}, base_names(model, layers)
    for name, module in layers.items():
        features = features_of(module)
        assert features is not None
        device = _device_of(name, module)
        sides[name] = SideUpdate(features, rank, seed, names[name], device)
    for name, side in sides.items():
        settle_layer(layers[name])
        attach(layers[name], side)
    return sides


def side_updates(model: nn.Module) -> dict[str, SideUpdate]:
    """Those that a model has, by the names of their layers."""
    return {
        name: side
        for name, module in model.named_modules()
        if isinstance(side := getattr(module, NAME, None), SideUpdate)
    }


def note_beside(model: nn.Module, learning: Mapping[str, Tensor]) -> None:
    """Let side updates know what else learns, which their files do not hold; an adapter's does not
    count.

    Args:
        model: with or without side updates.
        learning: what its groups were made of, by name.
    """
    sides = side_updates(model).values()
    if sides:
        apart = {id(p) for p in (*adapter_parameters(model), *(side.left for side in sides))}
        beside = tuple(name for name, p in learning.items() if id(p) not in apart)
        for side in sides:
            side.beside = beside


def base_names(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Layers' names in the base model, without what wrappers and adapters add, by those here.

    Raises:
        ValueError: two layers would have one name.
    """
    base = unwrapped(within_peft(unwrapped(model)))
    within = {id(module): name for name, module in base.named_modules()}
    found: dict[str, str] = {}
    for layer in layers:
        name = within.get(id(model.get_submodule(layer)), layer)
        name = without_layers(f"{name}.weight").removesuffix(".weight")
        if name in found.values():
            raise ValueError(
                f"layers must have one name each in the base model, got {name!r} twice"
            )
        found[layer] = name
    return found


def remove_side_updates(model: nn.Module) -> None:
    """Take all off, with what they have learnt; nothing where there are none."""
    for name in side_updates(model):
        detach(model.get_submodule(name))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Of the base model, which are called."""
    packed = {
        id(module.out_proj)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    of_adapters = {id(p) for p in adapter_parameters(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if features_of(module) is not None
        and id(module) not in packed
        and name.split(".")[-1] != "original_module"  # which peft replaces
        and not any(id(p) in of_adapters for p in module.parameters(recurse=False))
    }


def holds_packed(module: nn.Module) -> bool:
    """Whether a linear layer's weight is no plain tensor of numbers that could move."""
    weight = getattr(module, "weight", None)
    return (
        not isinstance(weight, Tensor)
        or is_quantised(weight)
        or not (weight.is_floating_point() or weight.is_complex())
    )


def _chosen(
    model: nn.Module, include: str | Sequence[str], exclude: str | Sequence[str]
) -> dict[str, nn.Module]:
    wanted, unwanted = patterns_in("include", include), patterns_in("exclude", exclude)
    used: set[str] = set()
    found = {}
    for name, module in linear_layers(model).items():
        taken, dropped = matching(wanted, [name]), matching(unwanted, [name])
        used.update(taken, dropped)
        if (taken if wanted else holds_packed(module)) and not dropped:
            found[name] = module
    for argument, patterns in (("include", wanted), ("exclude", unwanted)):
        for pattern in patterns:
            if pattern not in used:
                raise ValueError(
                    f"{argument} must match names of linear layers, got {pattern!r}, which matches "
                    "none"
                )
    if not found:
        raise ValueError(
            "model must have linear layers of quantised weights, or others that include= names, "
            "and that exclude= leaves: got none"
        )
    return found


def _device_of(name: str, module: nn.Module) -> torch.device:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    for tensor in tensors:
        if is_sharded(tensor) or tensor.is_meta:
            what = "on the meta device: add them where it has data" if tensor.is_meta else "sharded"
            raise ValueError(
                f"model must hold the layers that get side updates whole, got {name!r} {what}"
            )
    return tensors[0].device if tensors else torch.device("cpu")
