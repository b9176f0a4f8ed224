"""Move a model's frozen weights to a private file."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zofo_kernels import interruptible

from ..intact import as_before_on_error
from ..names import within_peft
from .accelerate_hooks import remove_offloading_hooks
from .checks import check_blocks, check_hooks, check_own_memory, check_some, goes, in_memory
from .handle import Offload
from .in_turn import drop, is_offloaded
from .maps import Memory, Plan
from .sources import Weight, weights_of
from .target import Target

_PIECE = 1 << 25
"""Bytes that are copied at a time."""


def offload_weights(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    device: torch.device | str | int | None = None,
    blocks: Collection[str] | None = None,
) -> Offload:
    """Move a model's frozen weights away, to a private file or the host, and compute as ever.

    On the CPU, they visit memory from the file as needed; with ``device="cuda"`` they visit a GPU
    from host memory.

    The parameters become tensors over a shared, writable map of that file. Each module's pages are
    read as it computes, the next module's ahead of it, and dropped when it is done; updates go
    through them a few megabytes at a time, and what they write goes back to the file. So little
    more than the largest layer is resident at a time: a model larger than memory trains by
    zeroth order, and an adapter above it by gradients. The arithmetic is the same, so results are
    those of the model in memory to the bit. Train with ``perturbation="streamed"``.

    With ``device=``, frozen matrices are in pinned memory of the host, or with ``folder=`` in the
    file, and the rest of the model is moved to the device. Each block of modules gets copies as it
    computes, made on a stream of their own during the block before, and in a backward again.
    Evaluations perturb the copies, on the device; updates are made on the host.

    Weights are copied to the file from wherever they are: memory, accelerate's hooks
    (``device_map=``, ``cpu_offload``, ``disk_offload``), which are then removed, or a checkpoint.
    The checkpoint and accelerate's files are read only. The file has no name, so it is gone when
    the model is, or the process ends, however it does; :class:`HybridZOFO`'s journal,
    :func:`save_base_weights` and ``save_pretrained`` save what was learnt.

    Args:
        model: on the CPU, or partly on the meta device. Freeze it (``requires_grad_(False)``) or
            add the adapter before; what requires gradients, and buffers, are in memory afterwards.
            With ``device=``, a further call places what was added since on the device.
        checkpoint: a folder of safetensors files, for what is on the meta device: parameters are
            found by name and converted to the model's dtype, one at a time. Build such a model by
            ``accelerate.init_empty_weights()``, which leaves buffers alone, and add an adapter
            afterwards.
        folder: of the private file, on a disk with room for the weights; None: that of temporary
            files, or host memory with ``device=``.
        device: that computes; None: the CPU. Frozen weights that are on it already stay there.
        blocks: with ``device=``, names of classes of modules whose weights come and go together,
            which those need that read weights of the modules in them; None: transformers'
            ``_no_split_modules``, where the model has them, or each module for itself.

    Returns:
        A handle with ``nbytes``, ``drop()`` and ``remove()``; training does not need it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: frozen weights are quantised, sharded or on another device, or share memory with
            another tensor, or accelerate computes with them elsewhere; some have no data; nothing
            is frozen; or ``folder`` is in memory.
        FileNotFoundError: ``checkpoint`` has no safetensors files.
        OSError: the disk has no room.
        RuntimeError: the system is not Linux. In all these cases, and after Ctrl-C, the model is
            as before.

    Example:
        >>> offload_weights(model.requires_grad_(False))
        >>> optimizer = HybridZOFO(
        ...     hybrid_param_groups(model, zo=dict(lr=1e-6)), perturbation="streamed")
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    target = Target(device)
    check_blocks(blocks, target)
    check_hooks(model, target.device)
    with as_before_on_error(model):  # by tying, too
        _tie(model)
        weights = weights_of(model, None if checkpoint is None else Path(checkpoint))
        going = [goes(w, target) for w in weights]
        there = [w for w in weights if is_offloaded(w.tensor)]
        frozen, others = [], []
        for weight, goes_away in zip(weights, going, strict=True):
            if goes_away and not is_offloaded(weight.tensor):
                frozen.append(weight)
            elif not (goes_away or _is_there(weight.tensor, target)):
                others.append(weight)
        check_some(frozen, there, others, target)
        check_own_memory(frozen, weights)
        plan = Plan()
        starts = [plan.place(weight.tensor.nbytes) for weight in frozen]
        memory = target.memory(plan.nbytes, folder) if frozen else None
        with interruptible(), torch.inference_mode(False), torch.no_grad():
            moved = [] if memory is None else _moved(frozen, memory, starts)
            loaded = [
                _checked(w).to(target.device, w.tensor.dtype, copy=w.tensor.is_meta) for w in others
            ]
        with torch.inference_mode(False), torch.no_grad():
            for weight, tensor in zip([*frozen, *others], [*moved, *loaded], strict=True):
                _set(weight, tensor)
        visits = target.visits(model, blocks)
        remove_offloading_hooks(model)
        target.mark(model)
        return Offload(model, visits, memory, len(frozen))


def _is_there(tensor: Tensor, target: Target) -> bool:
    """Whether it stays where it is."""
    if tensor.is_meta:
        return False
    return not target.visited or tensor.device == target.device or is_offloaded(tensor)


def _moved(weights: Sequence[Weight], memory: Memory, starts: Sequence[int]) -> list[Tensor]:
    """Tensors of the memory with the weights' elements and strides; their pages are dropped."""
    moved = []
    for weight, start in zip(weights, starts, strict=True):
        content, like = _checked(weight), weight.tensor
        into = memory.tensor(start, [like.numel()], like.dtype)
        flat = content.permute(in_memory(like)).reshape(-1)
        size = _PIECE // like.itemsize
        for low in range(0, flat.numel(), size):
            piece = into[low : low + size]
            piece.copy_(flat[low : low + size])
            drop(piece)
        moved.append(into.as_strided(like.shape, like.stride()))
    return moved


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
        if weight.tensor.grad is not None and weight.tensor.grad.device != tensor.device:
            weight.tensor.grad = weight.tensor.grad.to(tensor.device)
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
        try:
            base.tie_weights()
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                "model must be one whose tie_weights() works where some weights are on the meta "
                f"device, got {type(error).__name__}: {error}; where an adapter is around tied "
                "weights, offload the base model before you add it"
            ) from error
