"""What the CPU backend's kernels read: tables of runs, rows of keys, and room for factors."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from . import cpu_kernels as kernels
from . import cpu_noise
from .direction import Direction
from .distributions import BY_NAME
from .factor_rows import Block, split
from .memo import kept
from .region import Region, Regions
from .structure import FactorJob

_STORAGE = {
    torch.float32: (kernels.FP32, np.float32),
    torch.bfloat16: (kernels.BF16, np.uint16),
    torch.float16: (kernels.FP16, np.uint16),
    torch.float64: (kernels.FP64, np.float64),
}
_ROOM = 1 << 24
"""Factors that are in memory at a time, 64 MiB, but for those of one region."""


class Table(NamedTuple):
    """Runs of one dtype: their elements in all, the kernel's first arguments, and factors."""

    dtype: torch.dtype
    elements: int
    columns: tuple[Any, ...]
    jobs: NDArray[np.int64]
    """Of ``fill_factors``."""
    units: int
    """Rows of U and V that all jobs make for each of a direction's ranks."""


def tables(regions: Sequence[Region]) -> list[Table]:
    """One a dtype; those of :class:`Regions` are made once."""
    return _kept_tables(regions) if type(regions) is Regions else _build(regions)


@kept
def _kept_tables(regions: Regions) -> list[Table]:
    return _build(regions)


def _build(regions: Sequence[Region]) -> list[Table]:
    by_dtype: dict[torch.dtype, list[Region]] = {}
    for region in regions:
        by_dtype.setdefault(region.tensor.dtype, []).append(region)
    made = []
    for dtype, alike in by_dtype.items():
        (code, storage), width = _STORAGE[dtype], dtype.itemsize
        places, jobs, units = _places(alike)
        rows = [
            (region.tensor.data_ptr() + width * start, size, region.parameter, offset, place)
            for region, place in zip(alike, places, strict=True)
            for start, size, offset in region.runs()
        ]
        addresses, sizes, indices, offsets, where = zip(*rows, strict=True)
        columns = (
            np.empty(0, dtype=storage),
            code,
            np.array(addresses, dtype=np.int64),
            np.array(sizes, dtype=np.int64),
            np.array(indices, dtype=np.int64),
            np.array(offsets, dtype=np.uint64),
            np.array(where, dtype=np.int64),
        )
        made.append(Table(dtype, sum(sizes), columns, jobs, units))
    return made


_FULL = (0, 0, 0, 0)


def _places(regions: Sequence[Region]) -> tuple[list[tuple[int, ...]], NDArray[np.int64], int]:
    """Each region's row of ``places``; and the jobs, each factor made once, and their units."""
    block = Block.of(regions)
    places: list[tuple[int, ...]] = [
        _FULL if region.matrix is None else (*region.matrix, *block.places[region.parameter])
        for region in regions
    ]
    jobs = np.array(block.jobs, dtype=np.int64).reshape(len(block.jobs), 5)
    return places, jobs, block.units


# ---- directions -----------------------------------------------------------------------------


def key_rows(directions: Sequence[Direction]) -> NDArray[np.int64]:
    """Rows of ``keys``, without places of factors: int64, shape (directions, 5)."""
    if len(directions) == 1 and type(directions[0].step) is int:
        return _fixed_key_row(directions[0])
    return _make_key_rows(directions)


@functools.lru_cache(maxsize=64)
def _fixed_key_row(direction: Direction) -> NDArray[np.int64]:
    """Of a direction whose step is a number: a tensor may change."""
    return _make_key_rows([direction])


def _make_key_rows(directions: Sequence[Direction]) -> NDArray[np.int64]:
    rows = [(*d.key(), BY_NAME[d.distribution].code, d.rank, 0) for d in directions]
    return np.array(rows, dtype=np.int64).reshape(len(rows), 5)


def roots(directions: Iterable[Direction], compute: Any) -> NDArray[Any]:
    """1 / sqrt(rank) of each, 1 where noise is full."""
    return np.array([1 / math.sqrt(max(d.rank, 1)) for d in directions], dtype=compute)


class Factors(NamedTuple):
    """The factors of some directions for a table's matrices, in memory that tables may share."""

    memory: NDArray[np.float32]
    jobs: NDArray[np.int64]
    units: int
    rows: NDArray[np.int64]
    """Of ``keys``, one a direction of low rank."""

    def fill(self, low: int, high: int) -> None:
        """Make those of the rows ``low`` to ``high``."""
        cpu_noise.fill_factors(self.memory, self.units, self.jobs, self.rows, low, high)


def size_of_factors(regions: Sequence[Region], directions: Sequence[Direction]) -> int:
    """Numbers that the factors of these directions are, for the table that needs most."""
    rank = sum(direction.rank for direction in set(directions))
    return rank and rank * max(table.units for table in tables(regions))


def with_factors(
    directions: Sequence[Direction], table: Table, memory: NDArray[np.float32]
) -> tuple[NDArray[np.int64], Factors]:
    """Rows of ``keys`` for these directions, and their factors, to be made in ``memory``."""
    keys = key_rows(directions)
    if memory.size == 0:
        return keys, Factors(memory, table.jobs, table.units, keys[:0])
    keys, at, found = keys.copy(), 0, {}
    for direction, row in zip(directions, keys, strict=True):
        if direction.rank and direction not in found:
            row[cpu_noise.BLOCK] = at
            at += direction.rank * table.units
            found[direction] = row
        elif direction.rank:
            row[cpu_noise.BLOCK] = found[direction][cpu_noise.BLOCK]
    return keys, Factors(memory, table.jobs, table.units, np.array(list(found.values())))


def room_for(jobs: Sequence[FactorJob], directions: Sequence[Direction]) -> Factors:
    """Memory for the factors of directions of one rank, a block after the other."""
    places, units = _one_after_the_other(tuple(jobs))
    keys, block = key_rows(directions).copy(), directions[0].rank * units
    keys[:, cpu_noise.BLOCK] = np.arange(len(directions)) * block
    # torch's memory, so that what counts that counts them
    memory = torch.empty(len(directions) * block, dtype=torch.float32, device="cpu").numpy()
    return Factors(memory, places, units, keys)


@functools.lru_cache(maxsize=16)
def _one_after_the_other(jobs: tuple[FactorJob, ...]) -> tuple[NDArray[np.int64], int]:
    ends = np.cumsum([job.rows for job in jobs])
    starts = ends - [job.rows for job in jobs]
    return np.column_stack([np.array(jobs, dtype=np.int64), starts]), int(ends[-1])


def in_parts(regions: Sequence[Region], directions: Sequence[Direction]) -> list[Sequence[Region]]:
    """The regions, some at a time where their factors would need much memory."""
    if size_of_factors(regions, directions) <= _ROOM:
        return [regions]
    room = _ROOM // sum(direction.rank for direction in set(directions))
    return [*split(regions, room)]
