"""A list of weights as the backends take them: regions, and copies where memory is strided."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .region import Region, Regions
from .structure import Matrix

_ALIGNMENT = 64
"""Bytes; where copies begin."""
_ROOM = 1 << 20
"""Bytes; copies may take as much together even where each is smaller: every part costs a call."""


class _Strided(NamedTuple):
    """A tensor that is not contiguous, and where its copy lies in the buffer, in bytes."""

    tensor: Tensor
    start: int
    parameter: int
    offset: int
    row_length: int
    row_stride: int
    matrix: Matrix | None

    def copied(self, buffer: dict[torch.dtype, Tensor]) -> Region:
        tensor, start, *_ = self
        begin = start // tensor.itemsize
        copy = buffer[tensor.dtype][begin : begin + tensor.numel()].view(tensor.shape)
        return Region(copy.copy_(tensor), *self[2:])

    def write_back(self, region: Region) -> None:
        self.tensor.copy_(region.tensor)


class Layout:
    """Regions by device, for many passes.

    Args:
        regions: of one tensor each, not empty, that may be strided.
        passed: what passes call when they are done with a tensor, see :class:`Regions`.
    """

    def __init__(
        self, regions: Sequence[Region], passed: Callable[[Tensor], None] | None = None
    ) -> None:
        self._passed = passed
        dense: dict[torch.device, list[Region]] = {}
        strided: dict[torch.device, list[Region]] = {}
        for region in regions:
            tensor = region.tensor
            kind = dense if tensor.is_contiguous() and not tensor.is_neg() else strided
            kind.setdefault(tensor.device, []).append(region)
        self._dense = {device: Regions(some, passed) for device, some in dense.items()}
        self._strided = {device: list(_parts(some)) for device, some in strided.items()}
        self.devices = [*{**dense, **strided}]

    def parts(self) -> Iterator[tuple[torch.device, Sequence[Region]]]:
        """What a pass works on, part by part; nothing is allocated once the first one is out.

        Copies stand for tensors that are not contiguous: as many at a time as take no more memory
        than the largest one, or 1 MiB. They are written back when the next part is asked for.
        """
        buffers = {device: _buffer(device, parts) for device, parts in self._strided.items()}
        yield from self._dense.items()
        for device, parts in self._strided.items():
            for part in parts:
                regions = [one.copied(buffers[device]) for one in part]
                yield device, regions
                for one, region in zip(part, regions, strict=True):
                    one.write_back(region)
                    if self._passed is not None:
                        self._passed(one.tensor)


def _buffer(device: torch.device, parts: list[list[_Strided]]) -> dict[torch.dtype, Tensor]:
    """Room for the largest part, as a tensor of each dtype."""
    size = max(one.start + one.tensor.nbytes for part in parts for one in part)
    dtypes = {one.tensor.dtype for part in parts for one in part}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    memory = torch.empty(-(-size // widest.itemsize), dtype=widest, device=device)
    return {dtype: memory.view(dtype) for dtype in dtypes}


def _parts(regions: list[Region]) -> Iterator[list[_Strided]]:
    """In order, as many at a time as the largest one has room for."""
    room = max(_ROOM, *(region.tensor.nbytes for region in regions))
    part: list[_Strided] = []
    start = 0
    for region in regions:
        tensor = region.tensor
        if part and start + tensor.nbytes > room:
            yield part
            part, start = [], 0
        part.append(_Strided(tensor, start, *region[1:]))
        start += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    yield part
