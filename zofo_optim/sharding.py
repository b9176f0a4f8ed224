"""Sharded parameters: which elements of the full parameter this process holds.

DTensors are known by what torch says of them: shape, mesh and placements. FSDP2, tensor
parallelism and their combinations in meshes of several dimensions need no names of their own here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from zofo_kernels import Weights
from zofo_kernels._torch_compat import box_of, is_gathering, local_tensor


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


def whole_of(tensor: Any) -> Tensor:
    """All of a sharded tensor, gathered: all processes that hold shards call this."""
    if not is_sharded(tensor):
        whole: Tensor = tensor
        return whole
    # shards that are offloaded come from the host
    gathered: Tensor = tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
    return gathered


def pieces_of(parameter: Tensor, name: str = "parameter") -> list[Piece]:
    """The rectangles of the full parameter that make the local tensor, in order.

    Raises:
        ValueError: it has a placement that holds no part of the parameter, such as a partial sum.
    """
    if not is_sharded(parameter):
        return [Piece(parameter)]
    local, box = local_of(parameter), _box(parameter, name)
    if local.numel() == 0:
        return [Piece(local)]
    return list(_rectangles(local, [first for first, _ in box], parameter.shape))


def _box(parameter: Tensor, name: str) -> list[tuple[int, int]]:
    box = box_of(parameter)
    if box is None:
        raise ValueError(
            f"{name} must be replicated or sharded in one block a process, got placements "
            f"{parameter.placements}"  # type: ignore[attr-defined]
        )
    return box


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy what of a full tensor this process holds into a parameter."""
    if is_sharded(parameter):
        whole = whole[tuple(slice(*ends) for ends in _box(parameter, "parameter"))]
    local_of(parameter).copy_(whole)


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
        self._place()

    def _place(self) -> None:
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

    def refresh(self) -> None:
        """Know the tensors that the process holds now, where they are others.

        In its first forward pass FSDP2 copies shards that were loaded or moved since it made
        them to memory with room for all ranks' sizes; displaced ones stay displaced by that.
        """
        if not self.is_current():
            self._place()


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """Those modules of a model that FSDP2 shards, outer ones first."""
    return [module for module in model.modules() if is_fsdp(module)]


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 gathers parameters of a module's."""
    kind = _fsdp_kind()
    return kind is not None and isinstance(module, kind)


def _fsdp_kind() -> Any:
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free what FSDP2 has gathered, so that the next forward gathers the shards as they are then.

    The root module keeps its parameters gathered after a forward pass otherwise, and what was
    gathered ahead for a module that did not run is kept for its next pass.
    """
    for module in modules:
        if is_gathering(module):
            module.unshard()  # type: ignore[operator]  # waits for it
        module.reshard()  # type: ignore[operator]


def check_model(model: nn.Module | None, params: Sequence[Tensor]) -> None:
    """Raise ValueError where modules that are not known may gather parameters.

    Any DTensor may be a shard of FSDP2's once ``fully_shard`` was called in this process: it looks
    as one of tensor parallelism, which computes with the DTensors themselves.

    Args:
        model: that the parameters are of; None: unknown.
        params: as an optimizer has them.
    """
    kind, sharded = _fsdp_kind(), sum(map(is_sharded, params))
    if model is None and sharded and kind is not None and kind.__subclasses__():
        raise ValueError(
            "params must be what hybrid_param_groups(model) returned where weights are sharded, "
            f"got a list with {sharded} DTensors: the model tells what its layers gather them "
            "into, and so does restore_buffers=model. A copied or unpickled optimizer has lost "
            "the model: make a new one, and load the state_dict() of this one"
        )
