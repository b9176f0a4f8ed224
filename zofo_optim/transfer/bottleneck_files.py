"""Bottleneck adapters in files: one holds what they are, their weights and those of a new head."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base_weights import write_tensors
from ..modes import undisturbed
from .bottlenecks import CHILD, adapters_of, built, insert, saved_modules

FILE = "bottlenecks.safetensors"


def bottleneck_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the bottleneck adapters, and of ``modules_to_save``, by their names.

    Detached, not copied: a part of ``model.state_dict()``.

    Raises:
        ValueError: the model has no bottlenecks.
    """
    asked = getattr(model, "bottlenecks", None)
    if asked is None:
        raise ValueError("model must have bottlenecks (see add_bottlenecks), got one without")
    owners = {f"{name}.{CHILD}": adapter for name, adapter in adapters_of(model).items()}
    return _state({**owners, **saved_modules(model, asked)})


def save_bottlenecks(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write ``bottlenecks.safetensors``: :func:`bottleneck_state`, and ``model.bottlenecks``.

    Args:
        model: whose bottlenecks.
        folder: where to write; made where it is missing.

    Returns:
        The file; it is there whole, or not at all.

    Raises:
        ValueError: the model has no bottlenecks.
        ImportError: safetensors is not installed.
    """
    state = {name: t.contiguous() for name, t in bottleneck_state(model).items()}
    asked = json.dumps(model.bottlenecks)
    return write_tensors(Path(folder) / FILE, state, metadata={"bottlenecks": asked})


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
        FileNotFoundError: there is no such file.
        ValueError: it holds no bottlenecks, or those of a model of other names or shapes; nothing
            is changed.
        ImportError: safetensors is not installed.
    """
    from safetensors import safe_open

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
    model: nn.Module, asked: Mapping[str, object], state: Mapping[str, Tensor], trainable: bool
) -> None:
    """Put bottlenecks of these weights into the model; torch's generator is left alone.

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
    with undisturbed():
        for name, tensor in wanted.items():
            tensor.copy_(state[name])
        insert(model, asked, adapters, trainable)


def _state(owners: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, module in owners.items()
        for key, tensor in module.state_dict().items()
    }
