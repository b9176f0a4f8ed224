"""What can be offloaded, and what is refused."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from zofo_kernels import check_weight
from zofo_kernels.memory import first_shared, has_memory

from ..quantized.refusals import is_of_bitsandbytes
from .accelerate_hooks import offloading_hooks
from .sources import Weight
from .target import Target


def check_some(
    frozen: Sequence[Weight], there: Sequence[Weight], others: Sequence[Weight], target: Target
) -> None:
    """
    Args:
        frozen: what is to be offloaded.
        there: what is so already.
        others: what is to be placed on the device, such as an adapter that was added since.
        target: the device.

    Raises:
        ValueError: there is nothing to do; says why.
    """
    if frozen or (there and others):
        return
    if there:
        raise ValueError(
            "model must have frozen weights that are not offloaded yet, got one that is offloaded "
            "already"
        )
    if target.visited:
        raise ValueError(
            f"model must have frozen matrices that are not on {str(target.device)!r} already, "
            "where they would stay, got none: freeze it, and leave it on the CPU"
        )
    raise ValueError(
        "model must have frozen weights, got none that can be offloaded: call "
        "model.requires_grad_(False), or add the adapter, before"
    )


def check_own_memory(frozen: Sequence[Weight], weights: Sequence[Weight]) -> None:
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


def check_hooks(model: nn.Module, device: torch.device) -> None:
    for prefix, _, hook in offloading_hooks(model):
        theirs = torch.device("cpu" if hook.execution_device is None else hook.execution_device)
        if torch.empty(0, device=theirs).device != device:
            raise ValueError(
                f"model must compute on one device, got a device_map by which {prefix!r} computes "
                f"on {theirs}, and device={str(device)!r}: give that device, or another map"
            )


def check_blocks(blocks: Collection[str] | None, target: Target) -> None:
    if blocks is None:
        return
    if isinstance(blocks, str) or not all(isinstance(name, str) for name in blocks):
        raise TypeError(f"blocks must be a list of names of classes, got {blocks!r}")
    if not target.visited:
        raise ValueError(
            f"blocks must be None on the CPU, where no copies are made, got {blocks!r}"
        )


def goes(weight: Weight, target: Target) -> bool:
    """Whether it moves to the file, or the host.

    Raises:
        ValueError: it would have to, and cannot.
    """
    tensor, name = weight.tensor, weight.names[0]
    if not weight.is_parameter or tensor.requires_grad or tensor.numel() == 0:
        return False
    try:
        if is_of_bitsandbytes(tensor):
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


def _has_gaps(tensor: Tensor) -> bool:
    """Whether it takes more memory than its elements do."""
    return not tensor.permute(in_memory(tensor)).is_contiguous()


def in_memory(tensor: Tensor) -> list[int]:
    """Its dimensions, those first whose elements are farthest from each other."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: strides[d], reverse=True)
