"""Sharded parameters: which elements of the full parameter this process holds.

DTensors are known by what torch says of them: shape, mesh and placements. FSDP2, tensor
parallelism and their combinations in meshes of several dimensions need no names of their own here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from zofo_kernels import Weights
from zofo_kernels._torch_compat import box_of, local_tensor


class Piece(NamedTuple):
    """A rectangle of a full parameter that this process holds; see :class:`zofo_kernels.Region`."""

    tensor: Tensor
    offset: int = 0
    """Index of its first element in the full parameter, row-major."""
    rectangle: tuple[int, int] | None = None
    """Row length and row stride in the full parameter; None: its elements follow one another."""


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor: sharded, or replicated over a mesh."""
    tensors = sys.modules.get("torch.distributed.tensor")  # else there is none
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """What of a DTensor this process holds, the same object as long as it does; others themselves.

    It may be empty.
    """
    return local_tensor(tensor) if is_sharded(tensor) else tensor


def pieces_of(parameter: Tensor, name: str = "parameter") -> list[Piece]:
    """The rectangles of the full parameter that make the local tensor, in order.

    Raises:
        ValueError: it has a placement that holds no part of the parameter, such as a partial sum.
    """
    if not is_sharded(parameter):
        return [Piece(parameter)]
    local = local_of(parameter)
    box = box_of(parameter)
    if box is None:
        raise ValueError(
            f"{name} must be replicated or sharded in one block a process, got placements "
            f"{parameter.placements}"  # type: ignore[attr-defined]
        )
    if local.numel() == 0:
        return [Piece(local)]
    return list(_rectangles(local, [first for first, _ in box], parameter.shape))


def _rectangles(local: Tensor, first: Sequence[int], shape: Sequence[int]) -> Iterator[Piece]:
    """Of a block of a row-major array, as few as there can be."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    offset = sum(f * s for f, s in zip(first, strides, strict=True))
    partial = [d for d, size in enumerate(local.shape) if size != shape[d]]
    if not partial or all(size == 1 for size in local.shape[: partial[-1]]):
        yield Piece(local, offset)  # one run
        return
    last = partial[-1]
    length = local.shape[last] * strides[last]
    # rows are at one distance where at most the first of the dimensions before is a part
    before = [d for d in partial[:-1] if any(size > 1 for size in local.shape[:d])]
    if not before:
        yield Piece(local, offset, (length, strides[last - 1]))
        return
    for k, part in enumerate(local.detach().unbind()):  # a part of the first dimension each
        block = _rectangles(part, first[1:], shape[1:])
        for tensor, start, rectangle in block:
            yield Piece(tensor, (first[0] + k) * strides[0] + start, rectangle)


class Placed:
    """Parameters of a group with their places in the noise.

    Args:
        params: as the user gave them.
        indices: of each in the noise.
    """

    def __init__(self, params: Sequence[Tensor], indices: Sequence[int]) -> None:
        self.params = list(params)
        self.indices = list(indices)
        self.locals = [local_of(p) for p in self.params]
        found = [
            (piece, index, p.shape)
            for p, index in zip(self.params, self.indices, strict=True)
            for piece in pieces_of(p)
        ]
        self.weights = Weights(
            [piece.tensor for piece, _, _ in found],
            [index for _, index, _ in found],
            [piece.offset for piece, _, _ in found],
            [piece.rectangle for piece, _, _ in found],
            [None if piece.tensor.shape == shape else shape for piece, _, shape in found],
        )
        """Of all pieces."""

    def is_current(self) -> bool:
        """Whether this process still holds the same tensors."""
        now = zip(self.params, self.locals, strict=True)
        return all(local_of(p) is local for p, local in now)


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """Those modules of a model that FSDP2 shards, outer ones first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)  # none before torch 2.6
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def reshard(modules: Sequence[nn.Module]) -> None:
    """Free what FSDP2 has gathered, so that the next forward gathers the shards as they are then.

    The root module keeps its parameters gathered after a forward pass otherwise.
    """
    for module in modules:
        module.reshard()  # type: ignore[operator]
