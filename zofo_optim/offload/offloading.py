"""Move a model's frozen weights to a private file."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zofo_kernels import check_weight, interruptible
from zofo_kernels.memory import first_shared, has_memory

from ..intact import as_before_on_error
from ..names import within_peft
from .accelerate_hooks import offloading_hooks, remove_offloading_hooks
from .device_visits import DeviceVisits
from .in_turn import drop, is_offloaded
from .maps import Map, Memory, Plan
from .sources import Weight, weights_of
from .target import Target
from .visits import Visits

_PIECE = 1 << 25
"""Bytes that are copied at a time."""


class Offload:
    """What :func:`offload_weights` did: the weights stay offloaded as long as the model has them.

    Args:
        visits: the hooks.
        memory: the weights are in.
        count: of tensors in it.
    """

    def __init__(self, visits: Visits | DeviceVisits, memory: Memory, count: int) -> None:
        self._visits = visits
        self._memory = memory
        self.nbytes = len(memory)
        """Of the private file, or the host memory."""
        self.count = count
        """Of the weights in it."""

    def remove(self) -> None:
        """Take the hooks off: pages then stay resident until the kernel needs their memory.

        With ``device=``, the model then computes only when it is moved, as by ``model.to("cpu")``.
        """
        self._visits.remove()

    def drop(self) -> None:
        """Let all pages leave memory, after something outside of training has read the weights.

        Does nothing where they are in host memory.
        """
        if isinstance(self._memory, Map):
            self._memory.drop(0, self.nbytes)

    def __repr__(self) -> str:
        return f"Offload({self.count} tensors, {self.nbytes / 1e9:.2f} GB)"


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
    _check_blocks(blocks, target)
    _check_hooks(model, target.device)
    with as_before_on_error(model):  # by tying, too
        _tie(model)
        weights = weights_of(model, None if checkpoint is None else Path(checkpoint))
        frozen = [w for w in weights if _goes(w, target) and not is_offloaded(w.tensor)]
        if not frozen:
            raise ValueError(
                "model must have frozen weights that are not offloaded yet, got none: call "
                "model.requires_grad_(False), or add the adapter, before"
            )
        _check_own_memory(frozen, weights)
        plan = Plan()
        starts = [plan.place(weight.tensor.nbytes) for weight in frozen]
        memory = target.memory(plan.nbytes, folder)
        with interruptible(), torch.inference_mode(False), torch.no_grad():
            moved = [_moved(w, memory, start) for w, start in zip(frozen, starts, strict=True)]
            others = [w for w in weights if not (_goes(w, target) or _is_there(w.tensor, target))]
            loaded = [
                _checked(w).to(target.device, w.tensor.dtype, copy=w.tensor.is_meta) for w in others
            ]
        with torch.inference_mode(False), torch.no_grad():
            for weight, tensor in zip([*frozen, *others], [*moved, *loaded], strict=True):
                _set(weight, tensor)
        remove_offloading_hooks(model)
        return Offload(target.visits(model, blocks), memory, len(frozen))


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


def _goes(weight: Weight, target: Target) -> bool:
    """Whether it moves to the file, or the host.

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
    if tensor.device.type not in ("cpu", "meta") and tensor.device != target.device:
        raise ValueError(
            f"model must be on the CPU or the device that computes, got {name!r} on "
            f"{tensor.device}, and device={str(target.device)!r}"
        )
    if target.keeps(tensor):
        return False
    if _has_gaps(tensor):
        raise ValueError(
            f"model must have weights without gaps between their elements, got {name!r} of shape "
            f"{tuple(tensor.shape)} with strides {tensor.stride()}: make it a copy of its own, "
            "such as p.data = p.data.contiguous()"
        )
    return True


def _is_there(tensor: Tensor, target: Target) -> bool:
    """Whether it stays where it is."""
    if tensor.is_meta:
        return False
    return not target.visited or tensor.device == target.device or is_offloaded(tensor)


def _moved(weight: Weight, memory: Memory, start: int) -> Tensor:
    """A tensor of the map with the weight's elements and strides; its pages are dropped."""
    content, like = _checked(weight), weight.tensor
    into = memory.tensor(start, [like.numel()], like.dtype)
    flat = content.permute(_in_memory(like)).reshape(-1)
    size = _PIECE // like.itemsize
    for low in range(0, flat.numel(), size):
        piece = into[low : low + size]
        piece.copy_(flat[low : low + size])
        drop(piece)
    return into.as_strided(like.shape, like.stride())


def _in_memory(tensor: Tensor) -> list[int]:
    """Its dimensions, those first whose elements are farthest from each other."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: strides[d], reverse=True)


def _has_gaps(tensor: Tensor) -> bool:
    """Whether it takes more memory than its elements do."""
    return not tensor.permute(_in_memory(tensor)).is_contiguous()


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


def _check_hooks(model: nn.Module, device: torch.device) -> None:
    for prefix, _, hook in offloading_hooks(model):
        theirs = torch.device("cpu" if hook.execution_device is None else hook.execution_device)
        if torch.empty(0, device=theirs).device != device:
            raise ValueError(
                f"model must compute on one device, got a device_map by which {prefix!r} computes "
                f"on {theirs}, and device={str(device)!r}: give that device, or another map"
            )


def _check_blocks(blocks: Collection[str] | None, target: Target) -> None:
    if blocks is None:
        return
    if isinstance(blocks, str) or not all(isinstance(name, str) for name in blocks):
        raise TypeError(f"blocks must be a list of names of classes, got {blocks!r}")
    if not target.visited:
        raise ValueError(
            f"blocks must be None on the CPU, where no copies are made, got {blocks!r}"
        )
