"""The Triton backend's tables: what its launches work on, by address, on the device.

A pass along directions of low rank has two kinds of launches: matrices go to the kernels of
``triton_low_rank``, all other parameters to those of ``triton_kernels``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import triton_low_rank as low_rank
from .factor_rows import Block, split, units_of
from .memo import kept
from .region import Region, Regions
from .structure import STREAM_LEFT, STREAM_RIGHT, FactorJob, Matrix

VECTORS = 512
"""Vectors of 8 elements a program. With 4 warps a thread has 32 elements, 64 bytes of bf16 in
flight. Registers then let a multiprocessor (sm_90) hold all of its threads where 16-bit weights are
perturbed in place; in other passes in place 44 to 75 % of them for bf16 and 31 to 75 % for fp16; in
all passes 44 to 50 % for fp32 and 19 to 25 % for fp64. Along rank 1 it is 44 to 75 % for 16-bit
weights, 56 to 62 % for fp32 and 19 to 31 % for fp64. ``benchmarks/sass.py`` counts them."""
LONGEST = 1 << 30
"""Elements of a run of low rank, and rows and columns of its matrix: 32-bit numbers count them."""
ROOM = 1 << 24
"""Factors that are in memory at a time, 64 MiB, but for those of one region."""
_ALIGNMENT = 4
"""Factors begin at multiples of it, 16 bytes: V is read like weights."""


class Launch(NamedTuple):
    """What one launch works on: runs of one dtype, all aligned or all not.

    ``only`` is the row of the only run, passed by value; else ``table`` and ``items`` are on the
    device. Where they are not read they are any tensors.
    """

    dtype: torch.dtype
    aligned: bool
    programs: int
    table: Tensor
    items: Tensor
    only: list[int] | None = None


class Factors(NamedTuple):
    """The factors that a part needs, and how they are made; tables as of :class:`Launch`."""

    units: int
    """Numbers for each k."""
    programs: int
    table: Tensor
    items: Tensor
    only: list[int] | None = None


class Part(NamedTuple):
    """Regions that a pass works on at a time."""

    full: list[Launch]
    """Those with full noise."""
    low_rank: list[Launch]
    factors: Factors | None
    """What those of low rank need."""


class Multiples(NamedTuple):
    """What offsets of aligned runs divide by."""

    full: int
    low_rank: int


def parts(
    regions: Sequence[Region], sources: Sequence[Tensor] | None, rank: int, multiples: Multiples
) -> list[Part]:
    """What a pass works on; all tables are made before it begins.

    Those of :class:`Regions` in place are made once for the same further arguments.

    Args:
        rank: the sum of those of all directions whose factors are needed.
    """
    if rank == 0:
        return [Part(_launches(regions, sources, multiples.full), [], None)]
    if type(regions) is not Regions or sources is not None:
        return _parts(regions, sources, ROOM // rank, multiples)
    return _kept_parts(regions, min(ROOM // rank, _units(regions)), multiples)


@kept
def _units(regions: Regions) -> int:
    """As :func:`split` counts them: with that much room there is one part."""
    return sum(map(units_of, regions))


@kept
def _kept_parts(regions: Regions, room: int, multiples: Multiples) -> list[Part]:
    return _parts(regions, None, room, multiples)


def _parts(
    regions: Sequence[Region],
    sources: Sequence[Tensor] | None,
    room: int,
    multiples: Multiples,
) -> list[Part]:
    made, at = [], 0
    for some in split(regions, room):
        read = [r.tensor for r in some] if sources is None else sources[at : at + len(some)]
        at += len(some)
        chosen = [i for i, region in enumerate(some) if region.matrix is not None]
        others = [i for i, region in enumerate(some) if region.matrix is None]
        full = [some[i] for i in others]
        low = [some[i] for i in chosen]
        block = Block.of(low, _ALIGNMENT)
        made.append(
            Part(
                _launches(full, [read[i] for i in others], multiples.full) if full else [],
                _launches(low, [read[i] for i in chosen], multiples.low_rank, block) if low else [],
                _factors(block, low[0].tensor.device) if low else None,
            )
        )
    return made


# ---- runs -----------------------------------------------------------------------------------


def _rows(
    region: Region, source: Tensor, multiple: int, block: Block | None
) -> Iterator[tuple[bool, list[int]]]:
    """The region's rows of the kernels' table, with whether each is aligned.

    A run that is aligned but for its last elements gives two rows. ``multiple`` is what the offset
    of an aligned one divides by. ``block`` is given for those of low rank.
    """
    width = region.tensor.element_size()
    base = region.tensor.data_ptr(), source.data_ptr()
    matrix = region.matrix if block is not None else None
    if matrix is not None and max(matrix) > LONGEST:
        raise ValueError(
            f"a matrix must have at most {LONGEST} rows and columns for directions of low rank, "
            f"got {matrix.rows} x {matrix.columns} for parameter {region.parameter}"
        )
    for start, size, offset in region.runs():
        addresses = [address + start * width for address in base]
        aligned = all(address % 16 == 0 for address in addresses) and offset % multiple == 0
        if matrix is not None and matrix.columns % 8 != 0:
            aligned = False
        body = size // 8 * 8 if aligned else 0
        for yes, low, high in ((True, 0, body), (False, body, size)):
            if low < high:
                to, read = (address + low * width for address in addresses)
                row = [to, high - low, offset + low, region.parameter, read]
                if matrix is None or block is None:
                    yield yes, row
                    continue
                for piece in _pieces(row, yes, width):
                    lead = 0 if yes else piece[2] % 128
                    yield yes, piece + _place(piece[2] - lead, matrix, *block.places[piece[3]])


def _pieces(row: list[int], aligned: bool, width: int) -> Iterator[list[int]]:
    """A row, in parts of at most ``LONGEST`` elements, counted from its first Philox call."""
    to, size, offset, parameter, read = row
    lead = 0 if aligned else offset % 128
    for begin in range(0, lead + size, LONGEST):
        low, high = max(begin - lead, 0), min(begin + LONGEST - lead, size)
        yield [to + low * width, high - low, offset + low, parameter, read + low * width]


def _place(first: int, matrix: Matrix, left: int, right: int) -> list[int]:
    """The further columns of ``triton_low_rank.COLUMNS``, of a run that begins there.

    Args:
        first: index of the element that the run's first piece begins with.
        left, right: where row 0 of U and of V would be.
    """
    row, column = divmod(first, matrix.columns)
    which = row // matrix.rows
    return [
        column,
        row - which * matrix.rows,
        matrix.columns,
        divisor(matrix.columns),
        divisor(matrix.rows),
        left + row,
        right + which * matrix.columns,
    ]


def divisor(d: int) -> int:
    """How the kernels divide by 1 <= d <= LONGEST: m + 2^32 p, so that x // d is x m >> (31 + p).

    This holds for 0 <= x < 2^31: m exceeds 2^(31 + p) / d by less than 1, which adds less than
    x / 2^(31 + p) < 1 / d to the quotient.
    """
    p = (d - 1).bit_length()
    return -(-(1 << (31 + p)) // d) + (p << 32)


def _items(rows: NDArray[np.int64], aligned: bool) -> NDArray[np.int64]:
    """Each row's pieces: row + 2^32 * piece."""
    lead = 0 if aligned else rows[:, 2] % 128
    return _numbered(-(-(rows[:, 1] + lead) // (8 * VECTORS)))


def _numbered(pieces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row + 2^32 * piece, for so many pieces of each row."""
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    piece = np.arange(int(pieces.sum()), dtype=np.int64) - first
    items: NDArray[np.int64] = np.repeat(np.arange(len(pieces), dtype=np.int64), pieces) + (
        piece << 32
    )
    return items


def _launches(
    regions: Sequence[Region],
    sources: Sequence[Tensor] | None,
    multiple: int,
    block: Block | None = None,
) -> list[Launch]:
    """The launches of a pass; those of :class:`Regions` in place are made once a multiple."""
    if type(regions) is Regions and sources is None:
        return _kept_launches(regions, multiple)
    if len(regions) == 1 and len(regions[0].runs()) == 1:
        source = regions[0].tensor if sources is None else sources[0]
        rows = _rows(regions[0], source, multiple, block)
        return [_single(regions[0], aligned, row) for aligned, row in rows]
    return _build(regions, sources, multiple, block)


@kept
def _kept_launches(regions: Regions, multiple: int) -> list[Launch]:
    return _build(regions, None, multiple)


def _single(region: Region, aligned: bool, row: list[int]) -> Launch:
    """A launch that needs no table, for a run that serves one pass."""
    lead = 0 if aligned else row[2] % 128
    programs = -(-(row[1] + lead) // (8 * VECTORS))
    return Launch(region.tensor.dtype, aligned, programs, region.tensor, region.tensor, row)


def _build(
    regions: Sequence[Region],
    sources: Sequence[Tensor] | None,
    multiple: int,
    block: Block | None = None,
) -> list[Launch]:
    device = regions[0].tensor.device
    groups: dict[tuple[torch.dtype, bool], list[list[int]]] = {}
    for region, source in zip(regions, sources or [r.tensor for r in regions], strict=True):
        for aligned, row in _rows(region, source, multiple, block):
            groups.setdefault((region.tensor.dtype, aligned), []).append(row)
    made = []
    for (dtype, aligned), rows in groups.items():
        table = np.array(rows, dtype=np.int64)
        items = _items(table, aligned)
        made.append(Launch(dtype, aligned, items.size, *_upload(table, items, device)))
    return made


def _upload(
    table: NDArray[np.int64], items: NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Tensor]:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the table of the weights' addresses must be built before a CUDA graph is captured: "
            "run the same step on the same tensors once before capturing it"
        )
    buffer = torch.from_numpy(np.concatenate([table.ravel(), items]))
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    buffer = buffer.to(device, non_blocking=True)
    return buffer[: table.size], buffer[table.size :]


# ---- factors --------------------------------------------------------------------------------


def _factors(block: Block, device: torch.device) -> Factors:
    counts = np.array([job[3] for job in block.jobs], dtype=np.int64)
    pieces = -(-counts // low_rank.PIECE.value)
    programs = int(pieces.sum())
    (parameter, stream, *left), *others = block.jobs
    if stream == STREAM_LEFT and [job[:2] for job in others] == [(parameter, STREAM_RIGHT)]:
        (_, _, *right) = others[0]
        unread = torch.empty(0, dtype=torch.int64, device=device)
        only = [int(pieces[0]), parameter, *left, *right]
        return Factors(block.units, programs, unread, unread, only)
    table = np.array(block.jobs, dtype=np.int64)
    return Factors(block.units, programs, *_upload(table, _numbered(pieces), device))


@functools.cache  # as long as the process: a captured graph reads the table
def factors_of(jobs: tuple[FactorJob, ...], device: torch.device) -> Factors:
    """For all jobs, one after the other."""
    placed, at = [], 0
    for job in jobs:
        placed.append((*job, at))
        at += job.rows
    return _factors(Block({}, placed, at), device)
