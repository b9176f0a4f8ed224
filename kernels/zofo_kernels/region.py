"""Regions: what a pass over the weights works on, and where its elements are in the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from torch import Tensor

from .memory import check_storage, is_gone
from .structure import Matrix

Run = tuple[int, int, int]
"""Elements that follow one another both in a region's memory and in the full parameter.

Position of the first one in the region's tensor, flattened; number of elements; index of the
first one in the full parameter.
"""


class Region(NamedTuple):
    """A rectangle of a full parameter in memory: rows of one length, at one distance.

    The full parameter is unsharded and row-major. The index of an element there selects its
    noise. ``tensor`` holds the rectangle row after row: its element ``r * row_length + k`` is
    the full parameter's element ``offset + r * row_stride + k``. Of a full matrix, m x n:

    | region | ``offset`` | ``row_length`` | ``row_stride`` |
    |---|---|---|---|
    | the whole matrix | 0 | n | n |
    | ``Shard(0)``, rows [a, b) | a n | n | n |
    | ``Shard(1)``, columns [a, b) | a | b - a | n |
    | row k, as of an embedding; see :func:`regions_of_rows` | k n | n | n |

    With more dimensions, ``Shard(d)`` is a rectangle too: take n, a and b of dimension d times
    the sizes of all dimensions after it. Where stride and length are equal, no gap is between the
    rows: they make one run, however long they are. This is the default, with rows of one element.
    """

    tensor: Tensor
    """Contiguous; a whole number of rows, at least one."""
    parameter: int
    """The parameter's index among the zeroth-order parameters, in [0, 2**32)."""
    offset: int = 0
    """Index of the region's first element in the full parameter."""
    row_length: int = 1
    row_stride: int = 1
    """From the first element of a row to that of the next, in the full parameter."""
    matrix: Matrix | None = None
    """What directions of low rank take the full parameter for; None: they have full noise."""

    def runs(self) -> Sequence[Run]:
        """The contiguous parts in order: a single one, or one a row where there are gaps."""
        tensor, _, offset, length, stride, _ = self
        size = tensor.numel()
        if length in (stride, size):
            return ((0, size, offset),)
        return [(r * length, length, offset + r * stride) for r in range(size // length)]


def regions_of_rows(
    rows: Tensor,
    numbers: Sequence[int],
    parameter: int,
    offset: int = 0,
    matrix: Matrix | None = None,
) -> list[Region]:
    """Regions of single rows of a full matrix, in any order: those that an embedding reads.

    Args:
        rows: copies of the rows, contiguous, shape (len(numbers), n) for a matrix with n columns.
        numbers: of each row in the matrix, at least 0; a number may occur more than once.
        parameter: the matrix's index among the zeroth-order parameters.
        offset: index of the matrix's first element in the full parameter.
        matrix: see :class:`Region`.
    """
    length = rows.shape[1]
    return [
        Region(row, parameter, offset + number * length, length, length, matrix)
        for row, number in zip(rows.unbind(), numbers, strict=True)
    ]


def extent(names: str, position: int, elements: int, row_length: int, row_stride: int) -> int:
    """How far a rectangle reaches in the full parameter, from its first element past its last.

    Raises:
        ValueError: there is no such rectangle; the message calls it ``names[position]``.
    """
    if elements == 0:  # an empty shard, of whatever rectangle
        return 0
    if not 1 <= row_length <= row_stride or elements % row_length != 0:
        raise ValueError(
            f"{names}[{position}] must have rows that do not overlap, 1 <= row length <= row "
            f"stride, and whole ones only, got row length {row_length} and row stride "
            f"{row_stride} for {elements} elements"
        )
    return elements + (elements // row_length - 1) * (row_stride - row_length)


@dataclass(frozen=True, eq=False)
class Regions(Sequence[Region]):
    """Regions on one device. A backend makes its tables of their addresses once.

    Args:
        regions: of them.
        passed: where given, passes go through one region after the other, and call it with a
            region's tensor when they are done with that; it must not raise.

    Raises:
        TypeError: something else than a :class:`Region` is among them.
        ValueError: there is no region, one breaks its contract, or they are on several devices.
    """

    items: tuple[Region, ...]
    passed: Callable[[Tensor], None] | None

    def __init__(
        self, regions: Iterable[Region], passed: Callable[[Tensor], None] | None = None
    ) -> None:
        object.__setattr__(self, "items", tuple(regions))
        object.__setattr__(self, "passed", passed)
        if not self.items:
            raise ValueError("regions must hold at least one region, got none")
        for position, region in enumerate(self.items):
            if not isinstance(region, Region):
                kind = type(region).__name__
                raise TypeError(f"regions[{position}] must be a zofo_kernels.Region, got {kind}")
            tensor, parameter, offset, length, stride, matrix = region
            device = self.items[0].tensor.device
            if tensor.device != device:
                raise ValueError(f"regions must be on one device, got {device}, {tensor.device}")
            if not tensor.is_contiguous() or tensor.numel() == 0:
                raise ValueError(
                    f"regions[{position}] must be contiguous and not empty, got shape "
                    f"{tuple(tensor.shape)} with strides {tensor.stride()}"
                )
            if is_gone(tensor):
                check_storage(tensor, f"regions[{position}]")
            end = offset + extent("regions", position, tensor.numel(), length, stride)
            if not (0 <= parameter < 1 << 32 and 0 <= offset < end <= 1 << 63):
                raise ValueError(
                    f"regions[{position}] must have a parameter in [0, 2**32) and elements in "
                    f"[0, 2**63), got parameter {parameter} and elements [{offset}, {end})"
                )
            if matrix is not None and min(matrix) < 1:
                raise ValueError(f"regions[{position}] must have a matrix with elements: {matrix}")

    @overload
    def __getitem__(self, place: int) -> Region: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Region, ...]: ...
    def __getitem__(self, place: int | slice) -> Region | tuple[Region, ...]:
        return self.items[place]

    def __iter__(self) -> Iterator[Region]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def passed_of(regions: Sequence[Region]) -> Callable[[Tensor], None] | None:
    """What passes over these regions call, see :class:`Regions`."""
    return regions.passed if isinstance(regions, Regions) else None
