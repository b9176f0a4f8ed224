"""Where tensors lie in memory: whether it is there, and whether they share it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._torch_compat import is_wrapper_subclass


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; the host waits only where it is going to read the copy itself.

    Work on a device comes after copies to it. The host has no such order: what is copied to it
    without waiting may be read before it has arrived.
    """
    return tensor.to(device, non_blocking=device.type != "cpu")


def span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of its first byte and past its last one; ``tensor`` is not empty."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def is_gone(tensor: Tensor) -> bool:
    """Whether the storage holds less than the tensor's elements.

    A storage that is freed or resized moves, and so do its tensors' addresses: whoever keeps an
    address asks again where it has changed.
    """
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() < _needed(tensor)


def _needed(tensor: Tensor) -> int:
    """Bytes of the storage up to the tensor's last element."""
    before = int(tensor.storage_offset()) * tensor.itemsize
    if tensor.is_contiguous():
        return before + tensor.nbytes
    start, end = span(tensor)
    return before + end - start


def has_memory(tensor: Tensor) -> bool:
    """Whether the elements have addresses: not of a wrapper, meta, sparse or freed tensor."""
    plain = tensor.layout == torch.strided and not tensor.is_meta
    return plain and not is_wrapper_subclass(tensor) and not is_gone(tensor)


def check_storage(tensor: Tensor, name: str) -> None:
    """Raise ValueError where the memory behind a tensor is gone."""
    if is_gone(tensor):
        raise ValueError(
            f"{name} must hold data, got a storage of {tensor.untyped_storage().nbytes()} bytes "
            f"where {_needed(tensor)} are needed (freed by untyped_storage().resize_(0)?): bring "
            "the weights back first"
        )


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor do."""
    reach = 0  # past the elements of the dimensions so far
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1:
            if stride <= reach:
                break
            reach += (n - 1) * stride
    else:
        return False
    if stride == 0:
        return True
    start, end = span(tensor)
    width = tensor.element_size()
    marks = torch.zeros((end - start) // width, dtype=torch.bool, device="cpu")
    _cells(marks, tensor, start, start, width).fill_(True)
    return int(marks.sum()) < tensor.numel()


Span = tuple[int, int, int]
"""Address of a tensor's first byte, that past its last, and its position in a list."""


def first_shared(
    tensors: Sequence[Tensor], others: Sequence[Tensor] = ()
) -> tuple[int, int] | None:
    """Positions in ``[*tensors, *others]`` of two that share memory, one at least of ``tensors``.

    None where each byte has one owner. Strided tensors may lie in each other's gaps.
    """
    every = [*tensors, *others]
    spans: dict[torch.device, list[Span]] = {}
    for position, tensor in enumerate(every):
        if tensor.numel() > 0:
            spans.setdefault(tensor.device, []).append((*span(tensor), position))
    for on_device in spans.values():
        for near in _clusters(on_device):
            if found := _first_in(near, every, len(tensors)):
                return found
    return None


def _clusters(spans: list[Span]) -> Iterator[list[Span]]:
    """Those that reach into another one, in parts that do not reach into each other."""
    near: list[Span] = []
    reach = 0
    for one in sorted(spans):
        if one[0] >= reach:
            if len(near) > 1:
                yield near
            near = []
        near.append(one)
        reach = max(reach, one[1])
    if len(near) > 1:
        yield near


def _first_in(near: list[Span], every: Sequence[Tensor], count: int) -> tuple[int, int] | None:
    """:func:`first_shared` of one cluster, where ``every[:count]`` may share with none."""
    low, high = near[0][0], max(end for _, end, _ in near)
    unit = math.gcd(*(every[k].element_size() for *_, k in near), *(s - low for s, *_ in near))
    marks = torch.zeros((high - low) // unit, dtype=torch.uint8, device="cpu")
    for start, _, position in near:
        cells = _cells(marks, every[position], start, low, unit)
        if (cells if position < count else cells & 1).any():
            marks.zero_()
            cells.fill_(1)
            for other_start, _, other in near:
                if (
                    other != position
                    and min(other, position) < count
                    and (_cells(marks, every[other], other_start, low, unit).any())
                ):
                    return min(other, position), max(other, position)
        cells.bitwise_or_(1 if position < count else 2)
    return None


def _cells(marks: Tensor, tensor: Tensor, start: int, low: int, unit: int) -> Tensor:
    """A view of the marks that stand for a tensor's bytes: one mark for ``unit`` bytes.

    Args:
        start: address of the tensor's first byte.
        low: address that the first mark stands for.
    """
    each = tensor.element_size() // unit
    size = [n if stride else 1 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    strides = [stride * each for stride in tensor.stride()]
    return marks.as_strided((*size, each), (*strides, 1), (start - low) // unit)
