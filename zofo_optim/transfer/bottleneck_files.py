"""Bottleneck adapters in files: one holds what they are, their weights and those of a new head."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base_weights import write_once, write_tensors
from ..modes import undisturbed
from ..sharding import fsdp_modules, is_sharded, reshard, whole_of
from .bottleneck_targets import CHILD
from .bottlenecks import built, insert, owners_of, saved_modules

FILE = "bottlenecks.safetensors"


def bottleneck_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the bottleneck adapters, and of ``modules_to_save``, by their names.

    Detached, not copied: a part of ``model.state_dict()``.

    Raises:
        ValueError: the model has no bottlenecks.
    """
    if not hasattr(model, "bottlenecks"):
        raise ValueError("model must have bottlenecks (see add_bottlenecks), got one without")
    return _state(owners_of(model))


def save_bottlenecks(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write ``bottlenecks.safetensors``: :func:`bottleneck_state`, and ``model.bottlenecks``.

    Where weights are sharded (DTensors, as of ``fully_shard``), all processes call this: they are
    gathered, and the first process writes the file.

    Args:
        model: whose bottlenecks.
        folder: where to write; made where it is missing.

    Returns:
        The file; it is there whole, or not at all.

    Raises:
        ValueError: the model has no bottlenecks.
        RuntimeError: the process that writes could not, and this is another one.
        ImportError: safetensors is not installed.
    """
    reshard(fsdp_modules(model))
    state = bottleneck_state(model)
    path, metadata = Path(folder) / FILE, {"bottlenecks": json.dumps(model.bottlenecks)}
    whole = {name: whole_of(tensor).contiguous() for name, tensor in state.items()}
    if not any(map(is_sharded, state.values())):
        return write_tensors(path, whole, metadata)
    return write_once(path, whole, metadata, torch.distributed.get_rank() == 0, _all_set)


def _all_set(flag: bool) -> bool:
    flags: list[bool] = [False] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(flags, flag)
    return all(flags)


def load_bottlenecks(
    model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False
) -> nn.Module:
    """Put the bottlenecks that :func:`save_bottlenecks` wrote into a model without any.

    Args:
        model: a base model of the same shapes; changed in place, and frozen.
        folder: holds ``bottlenecks.safetensors``; or that file.
        trainable: whether the adapters and ``modules_to_save`` require gradients.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is no module.
        FileNotFoundError: there is no such file.
        ValueError: it holds no bottlenecks, or those of a model of other names or shapes, or of
            dtypes that this one's cannot hold; nothing is changed.
        ImportError: safetensors is not installed.
    """
    from safetensors import safe_open

    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; the order is "
            "load_bottlenecks(model, folder)"
        )
    path = Path(folder)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no {FILE} at {str(folder)!r}")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "bottlenecks" not in metadata:
        raise ValueError(f"folder must hold what save_bottlenecks wrote, got {str(path)!r}")
    put(model, json.loads(metadata["bottlenecks"]), state, trainable=trainable)
    return model


def put(
    model: nn.Module,
    asked: Mapping[str, object],
    state: Mapping[str, Tensor],
    trainable: bool,
    cast: bool = False,
) -> None:
    """Put bottlenecks of these weights into the model; torch's generator is left alone.

    Args:
        model, asked, trainable: see :func:`insert`.
        state: by the names of :func:`bottleneck_state`.
        cast: whether weights may be rounded to the dtypes that they have in the model.

    Raises:
        ValueError: the weights are not those of such bottlenecks; nothing is changed.
    """
    with torch.random.fork_rng():
        adapters = built(model, asked)
    owners = {f"{name}.{CHILD}": adapter for name, adapter in adapters.items()}
    wanted = _state({**owners, **saved_modules(model, asked)})
    for name in [*wanted, *state]:
        shapes = [tuple(part[name].shape) if name in part else None for part in (wanted, state)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the bottlenecks must fit the model, but it has {shapes[0] or 'no such tensor'} "
                f"where they have {shapes[1] or 'no such tensor'}: {name!r}"
            )
        dtypes = [part[name].dtype for part in (wanted, state)]
        if not cast and torch.promote_types(*dtypes) != dtypes[0]:
            raise ValueError(
                f"model must have a dtype that holds the bottlenecks' weights, got {dtypes[0]} for "
                f"{name!r} of {dtypes[1]}"
            )
    with undisturbed():
        insert(model, asked, adapters, trainable)
        for name, tensor in wanted.items():
            tensor.copy_(state[name])


def _state(owners: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, module in owners.items()
        for key, tensor in module.state_dict().items()
    }
