"""Move a model's frozen weights to a private file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zofo_kernels import check_weight
from zofo_kernels.memory import first_shared, has_memory

from ..names import within_peft
from .in_turn import is_offloaded
from .maps import Map, Plan, new_map, pages_of
from .sources import Weight, offloading_hooks, weights_of
from .visits import Visits

_PIECE = 1 << 25
"""Bytes that are copied at a time."""


class Offload:
    """What :func:`offload_weights` did: the weights stay offloaded as long as the model has them.

    Args:
        model: whose weights are in ``map``.
        map: the file.
        count: of tensors in it.
    """

    def __init__(self, model: nn.Module, map: Map, count: int) -> None:
        self._visits = Visits(model)
        self._map = map
        self.nbytes = len(map)
        """Of the private file."""
        self.count = count
        """Of the weights in it."""

    def remove(self) -> None:
        """Take the hooks off: pages then stay resident until the kernel needs their memory."""
        self._visits.remove()

    def drop(self) -> None:
        """Let all pages leave memory, after something outside of training has read the weights."""
        self._map.drop(0, self.nbytes)

    def __repr__(self) -> str:
        return f"Offload({self.count} tensors, {self.nbytes / 1e9:.2f} GB)"


def offload_weights(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
) -> Offload:
    """Move a model's frozen weights to a private file, from which they visit memory as needed.

    The parameters become tensors over a shared, writable map of that file. Each module's pages are
    read as it computes, the next module's ahead of it, and dropped when it is done; updates go
    through them a few megabytes at a time, and what they write goes back to the file. So little
    more than the largest layer is resident at a time: a model larger than memory trains by
    zeroth order, and an adapter above it by gradients. The arithmetic is the same, so results are
    those of the model in memory to the bit. Train with ``perturbation="streamed"``.

    Weights are copied to the file from wherever they are: memory, accelerate's hooks
    (``device_map=``, ``cpu_offload``, ``disk_offload``), which are then removed, or a checkpoint.
    The checkpoint and accelerate's files are read only. The file has no name, so it is gone when
    the model is, or the process ends, however it does; :class:`HybridZOFO`'s journal,
    :func:`save_base_weights` and ``save_pretrained`` save what was learnt.

    Args:
        model: on the CPU, or partly on the meta device. Freeze it (``requires_grad_(False)``) or
            add the adapter before; what requires gradients, and buffers, are in memory afterwards.
        checkpoint: a folder of safetensors files, for what is on the meta device: parameters are
            found by name and converted to the model's dtype, one at a time. Build such a model by
            ``accelerate.init_empty_weights()``, which leaves buffers alone, and add an adapter
            afterwards.
        folder: of the private file, on a disk with room for the weights; None: that of temporary
            files.

    Returns:
        A handle with ``nbytes``, ``drop()`` and ``remove()``; training does not need it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: frozen weights are quantised, sharded or not on the CPU, or share memory with
            another tensor, or accelerate computes with them elsewhere; some have no data; nothing
            is frozen; or ``folder`` is in memory.
        FileNotFoundError: ``checkpoint`` has no safetensors files.
        OSError: the disk has no room. In all these cases the model is as before.
        RuntimeError: the system is not Linux.

    Example:
        >>> offload_weights(model.requires_grad_(False))
        >>> optimizer = HybridZOFO(
        ...     hybrid_param_groups(model, zo=dict(lr=1e-6)), perturbation="streamed")
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_hooks(model)
    _tie(model)
    weights = weights_of(model, None if checkpoint is None else Path(checkpoint))
    frozen = [w for w in weights if _goes(w) and not is_offloaded(w.tensor)]
    if not frozen:
        raise ValueError(
            "model must have frozen weights that are not offloaded yet, got none: call "
            "model.requires_grad_(False), or add the adapter, before"
        )
    _check_own_memory(frozen, weights)
    plan = Plan()
    starts = [plan.place(weight.tensor.nbytes) for weight in frozen]
    map = new_map(folder, plan.nbytes)
    with torch.inference_mode(False), torch.no_grad():
        moved = [_moved(w, map, start) for w, start in zip(frozen, starts, strict=True)]
        others = [w for w in weights if w.tensor.is_meta and not _goes(w)]
        loaded = [_checked(w).to(w.tensor.dtype, copy=True) for w in others]
        for weight, tensor in zip([*frozen, *others], [*moved, *loaded], strict=True):
            _set(weight, tensor)
    _remove_hooks(model)
    return Offload(model, map, len(frozen))


def _check_own_memory(frozen: Sequence[Weight], weights: Sequence[Weight]) -> None:
    """
    Raises:
        ValueError: a weight shares memory with another tensor of the model, which it would leave.
    """
    here = [w for w in frozen if has_memory(w.tensor)]
    goes = {id(w) for w in frozen}
    others = [w for w in weights if id(w) not in goes and has_memory(w.tensor)]
    shared = first_shared([w.tensor for w in here], [w.tensor for w in others])
    if shared is not None:
        first, second = ([*here, *others][place].names[0] for place in shared)
        raise ValueError(
            f"model must not have tensors that share memory, got {first!r} and {second!r}: make "
            "one of them a copy, or both one parameter"
        )


def _goes(weight: Weight) -> bool:
    """Whether it moves to the file.

    Raises:
        ValueError: it would have to, and cannot.
    """
    tensor, name = weight.tensor, weight.names[0]
    if not weight.is_parameter or tensor.requires_grad or tensor.numel() == 0:
        return False
    try:
        if type(tensor).__name__ in ("Params4bit", "Int8Params"):
            raise TypeError(f"{name} is quantised by bitsandbytes")
        if not tensor.is_floating_point() and not tensor.is_complex():
            return False
        check_weight(torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor, name)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"model must have plain frozen weights to be offloaded, quantised and sharded ones "
            f"cannot be: {error}"
        ) from error
    if tensor.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"model must be on the CPU, got {name!r} on {tensor.device}: offloaded weights are "
            "computed with on the CPU"
        )
    return True


def _moved(weight: Weight, map: Map, start: int) -> Tensor:
    """A tensor of the map with the weight's elements; its pages are dropped."""
    content, like = _checked(weight), weight.tensor
    tensor = map.tensor(start, like.shape, like.dtype)
    into, flat = tensor.view(-1), content.reshape(-1)
    size = _PIECE // like.itemsize
    for low in range(0, flat.numel(), size):
        piece = into[low : low + size]
        piece.copy_(flat[low : low + size])
        pages = pages_of(piece)
        assert pages is not None
        pages.drop()
    return tensor


def _checked(weight: Weight) -> Tensor:
    content = weight.content()
    if content.shape != weight.tensor.shape:
        raise ValueError(
            f"checkpoint must have the model's shapes, got {tuple(content.shape)} for "
            f"{weight.names[0]!r} of shape {tuple(weight.tensor.shape)}"
        )
    return content


def _set(weight: Weight, tensor: Tensor) -> None:
    """In place of what the model has: the same object, unless that is on the meta device."""
    if not weight.tensor.is_meta:
        weight.tensor.data = tensor
        return
    if weight.is_parameter:
        made = nn.Parameter(tensor, requires_grad=weight.tensor.requires_grad)
        made.__dict__.update(weight.tensor.__dict__)
        tensor = made
    weight.put(tensor)


# ---- what other libraries know of the model -----------------------------------------------------


def _tie(model: nn.Module) -> None:
    """Accelerate and meta devices part weights that are one."""
    base: Any = within_peft(model)
    if hasattr(base, "tie_weights") and any(p.is_meta for p in model.parameters()):
        base.tie_weights()


def _check_hooks(model: nn.Module) -> None:
    for prefix, _, hook in offloading_hooks(model):
        device = torch.device("cpu" if hook.execution_device is None else hook.execution_device)
        if device.type != "cpu":
            raise ValueError(
                f"model must compute on the CPU, got a device_map by which {prefix!r} computes on "
                f"{device}: offloaded weights are computed with on the CPU"
            )


def _remove_hooks(model: nn.Module) -> None:
    """Accelerate's, without what they do on leaving: bring all weights back."""
    found: Sequence[tuple[str, nn.Module, Any]] = list(offloading_hooks(model))
    if not found:
        return
    from accelerate.hooks import remove_hook_from_module

    for _, _, hook in found:
        hook.offload = False
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():  # save_pretrained and Trainer ask for it
        module.__dict__.pop("hf_device_map", None)
