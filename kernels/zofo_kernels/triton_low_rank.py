"""Kernels for directions of low rank, compiled by Triton: factors, and the pass over matrices.

The pass has the tiles of ``triton_kernels``, and none of its noise: it reads U and V, made before
by :func:`factors_kernel`, and adds up their products. U changes from row to row only, so a vector
reads one number of it where no vector reaches into the next row; V is read as weights are, and
found in a cache, since rows share it.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from . import triton_kernels
from .triton_kernels import key_of, noise_of, piece_of, term_of, tile_of
from .triton_rounding import final, on_grid, round_coarse, unpack

GAUSSIAN = triton_kernels.GAUSSIAN
RADEMACHER = triton_kernels.RADEMACHER
COLUMNS = tl.constexpr(12)
"""Of the table: those of the other kernel, and

5, 6: column and row, in its matrix, of the first element. Of pieces that are not aligned this is
    the one that the first Philox call begins with, before the run's start.
7: columns of the matrix.
8, 9: how to divide by its columns and by its rows, see ``_divided``.
10, 11: where in a block of factors the U of that row is, and column 0 of V in the row's matrix.
"""
JOB_COLUMNS = tl.constexpr(5)
"""Of a table of factors: parameter, stream, first row, rows, where they begin in a block."""
PIECE = tl.constexpr(1024)
"""Rows of a factor that a program makes."""


@triton.jit(
    do_not_specialize=["k0", "k1", "rank", "at", "units", "half"]
    + [f"{side}_{name}" for side in ("left", "right") for name in ("first", "count", "begin")]
    + ["parameter"],
    do_not_specialize_on_alignment=["factors", "keys", "table", "items"],
)
def factors_kernel(
    factors,
    keys,
    table,
    items,
    k0: tl.uint32,
    k1: tl.uint32,
    rank: tl.int32,
    at: tl.int64,
    units: tl.int64,
    half: tl.int32,
    parameter: tl.int64,
    left_first: tl.int64,
    left_count: tl.int64,
    left_begin: tl.int64,
    right_first: tl.int64,
    right_count: tl.int64,
    right_begin: tl.int64,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    KIND: tl.constexpr,
    ONLY: tl.constexpr,
    KEYS_ON_DEVICE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """factors[(at + k) * units + begin + row - first] <- (row, k) of U or V, fp32.

    A program makes a piece of a job, for a direction: the second axis of the grid counts
    directions of one rank and distribution.

    Args:
        keys: int32 (directions, 4), see keys_kernel; read where KEYS_ON_DEVICE, else k0 and k1.
        table: int64, rows of JOB_COLUMNS, a row a job.
        items: int64, one a program: the job's row + 2^32 * the piece of it.
        at: of the first direction. units: size of the factors of a k.
        half, parameter, left_..., right_...: the pieces of U, and the jobs of the only U and V,
            where ONLY.
        LEFT, RIGHT: their streams.
    """
    which = tl.program_id(1)
    k0, k1 = key_of(keys, which, k0, k1, KEYS_ON_DEVICE)
    if ONLY:
        piece = tl.program_id(0)
        is_left = piece < half
        piece = tl.where(is_left, piece, piece - half).to(tl.int64)
        parameter = parameter.to(tl.int64)
        stream = tl.where(is_left, LEFT, RIGHT)
        first = tl.where(is_left, left_first.to(tl.int64), right_first.to(tl.int64))
        count = tl.where(is_left, left_count.to(tl.int64), right_count.to(tl.int64))
        begin = tl.where(is_left, left_begin.to(tl.int64), right_begin.to(tl.int64))
    else:
        item = tl.load(items + tl.program_id(0))
        row = table + JOB_COLUMNS * (item & 0xFFFFFFFF)
        piece = item >> 32
        parameter, stream = tl.load(row), tl.load(row + 1)
        first, count, begin = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    rows = tl.minimum(count - piece * PIECE, PIECE).to(tl.int32)
    low = (first + piece * PIECE) * rank  # element of the stream
    lead = (low & 127).to(tl.int32)  # tiles start at whole Philox calls
    end = lead + rows * rank
    one = 0x3F800000 ^ (count >> 63).to(tl.uint32)  # see gaussian
    units = units.to(tl.int64)
    out = factors + (at.to(tl.int64) + which * rank) * units + begin + piece * PIECE
    VECTORS: tl.constexpr = PIECE // 8
    element = tl.arange(0, VECTORS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    for tile in range(tl.cdiv(end, PIECE)):
        vector = (low - lead + tile * PIECE) >> 3
        noise = noise_of(vector, parameter, k0, k1, one, KIND, False, VECTORS, NATIVE, stream)
        if KIND == RADEMACHER:
            noise = (0x3F800000 | (noise & 0x80000000)).to(tl.float32, bitcast=True)
        place = tile * PIECE + element - lead
        inside = (place >= 0) & (place < end - lead)
        index = tl.maximum(place, 0)
        its_row = index // rank
        k = index - its_row * rank
        tl.store(out + k * units + its_row, noise, mask=inside)


@triton.jit
def _divided(x, by):
    """x // d for int32 x of at least 0; by = m + 2^32 p: see ``triton_tables.divisor``."""
    high = tl.umulhi(x.to(tl.uint32) << 1, (by & 0xFFFFFFFF).to(tl.uint32))
    return (high >> (by >> 32).to(tl.uint32)).to(tl.int32)


@triton.jit
def _where(
    column,
    row,
    columns,
    by_columns,
    by_rows,
    left,
    ALIGNED: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Of a tile's elements: rows past the run's first, and places in V past its matrix's.

    Args:
        column: of the tile's first element, int32, counted from the start of the run's first row.
        row: of the run's first element in its matrix.
        left: elements of the tile, where it is aligned: others get the places of its last vector.
    """
    vector = 8 * tl.arange(0, VECTORS)
    if ALIGNED:
        x = column + tl.minimum(vector, left - 8)
        down = _divided(x, by_columns)
        across = _divided(row + down, by_rows) * columns + (x - down * columns)
        return down, tl.multiple_of(across, [8])
    else:
        x = column + vector
        down = _divided(x, by_columns)
        x = (x - down * columns)[:, None] + tl.arange(0, 8)[None, :]
        past = x - columns  # at most 6: a number so small is divided right in floats
        part = 1.0 / columns.to(tl.float32)
        further = tl.where(past < 0, 0, 1 + ((past + 0.5) * part).to(tl.int32))
        x -= further * columns
        down = down[:, None] + further
        return down, _divided(row + down, by_rows) * columns + x


@triton.jit
def _one(pointer, NATIVE: tl.constexpr):
    """The number at each pointer, wherever the compiler has the pointer: a load may move it."""
    if NATIVE:
        address = pointer.to(tl.int64)
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [address], tl.float32, True, 1
        )
    else:
        return tl.load(pointer)


@triton.jit
def _product(
    a,
    at,
    where,
    ALIGNED: tl.constexpr,
    PAIRS: tl.constexpr,
    VECTORS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """a u and v of a tile, for one k, to be multiplied; its factors begin at ``at``."""
    left, right, down, across, inside = where
    left += at
    right = tl.multiple_of(right + at, 16)
    if PAIRS:
        u = _one(left + down, NATIVE)[:, None, None]
        # two loads like that of the weights: each 16 bytes of a vector for its thread
        half = across[:, None] + tl.arange(0, 4)[None, :]
        v = tl.join(tl.load(right + half), tl.load(right + 4 + half))
        v = v.reshape(VECTORS, 2, 2, 2).permute(0, 3, 1, 2).reshape(VECTORS, 4, 2)
    elif ALIGNED:
        u = _one(left + down, NATIVE)[:, None]
        v = tl.load(right + (across[:, None] + tl.arange(0, 8)[None, :]))
    else:
        u = tl.load(left + down, mask=inside)
        v = tl.load(right + across, mask=inside)
    return a * u.to(a.dtype), v.to(a.dtype)


@triton.jit
def _add(
    total,
    a,
    at,
    units,
    rank,
    where,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PAIRS: tl.constexpr,
    VECTORS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """total + a u v for k from 0 on, one after the other. RANK: the rank, or 0: any."""
    if RANK > 0:
        for k in tl.static_range(RANK):
            au, v = _product(a, at + k * units, where, ALIGNED, PAIRS, VECTORS, NATIVE)
            total = tl.fma(tl.broadcast_to(au, total.shape), v, total)
    else:
        for k in range(rank):
            au, v = _product(a, at + k * units, where, ALIGNED, PAIRS, VECTORS, NATIVE)
            total = tl.fma(tl.broadcast_to(au, total.shape), v, total)
    return total


@triton.jit
def _nothing(like):
    """-0, of that shape and type: what is added to it keeps its sign, 0 too."""
    if like.dtype == tl.float64:
        return tl.full(like.shape, 1 << 63, tl.uint64).to(tl.float64, bitcast=True)
    else:
        return tl.full(like.shape, 1 << 31, tl.uint32).to(tl.float32, bitcast=True)


_BY_VALUE = ["a0", "a1", "b0", "b1", "scale_a", "scale_b", "weight_decay", "samples"]
_BY_VALUE += ["coarse_a", "coarse_b", "backs"]
_BY_VALUE += ["units", "rank_a", "root_a", "at_a", "rank_b", "root_b", "at_b"]
_BY_VALUE += ["only_address", "only_size", "only_offset", "only_parameter", "only_source"]
_BY_VALUE += ["only_column", "only_row", "only_columns", "only_by_columns", "only_by_rows"]
_BY_VALUE += ["only_left", "only_right"]
_POINTERS = ["table", "items", "keys", "coefficients", "rate", "factors"]


@triton.jit(do_not_specialize=_BY_VALUE, do_not_specialize_on_alignment=_POINTERS)
def low_rank_kernel(
    table,
    items,
    keys,
    coefficients,
    rate,
    factors,
    a0: tl.uint32,
    a1: tl.uint32,
    b0: tl.uint32,
    b1: tl.uint32,
    scale_a: tl.int64,
    scale_b: tl.int64,
    weight_decay: tl.int64,
    samples: tl.int32,
    coarse_a: tl.int32,
    coarse_b: tl.int32,
    backs: tl.int32,
    units: tl.int64,
    rank_a: tl.int32,
    root_a: tl.int64,
    at_a: tl.int64,
    rank_b: tl.int32,
    root_b: tl.int64,
    at_b: tl.int64,
    only_address: tl.int64,
    only_size: tl.int64,
    only_offset: tl.int64,
    only_parameter: tl.int64,
    only_source: tl.int64,
    only_column: tl.int64,
    only_row: tl.int64,
    only_columns: tl.int64,
    only_by_columns: tl.int64,
    only_by_rows: tl.int64,
    only_left: tl.int64,
    only_right: tl.int64,
    STORAGE: tl.constexpr,
    ONLY: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOURCE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    UPDATE: tl.constexpr,
    SEVERAL: tl.constexpr,
    RANK: tl.constexpr,
    MIXED: tl.constexpr,
    DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    KEYS_ON_DEVICE: tl.constexpr,
    COARSE: tl.constexpr,
    VECTORS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Shift a, then shift b or the update, of matrices along directions of low rank.

    Args: as of ``pass_kernel``, but
        factors: fp32, see :func:`factors_kernel`, whose ``units`` these are, a multiple of 4.
        rank_a, root_a, at_a: of shift a: rank, bits of the double 1 / sqrt(rank), and what
            factors_kernel calls ``at``. rank_b, root_b, at_b: of shift b or the update's
            direction; where it has several, of all, and at of the first, which the others follow.
        A, B, UPDATE: which of them there are.
        MIXED: the update's directions have several ranks, which are in ``keys``; 0 is full noise,
            without factors.
        ALIGNED: columns and first columns divide by 8, too.
    """
    COMPUTE: tl.constexpr = tl.float64 if STORAGE == tl.float64 else tl.float32
    PAIRS: tl.constexpr = ALIGNED and STORAGE.primitive_bitwidth == 16
    AFTER_A: tl.constexpr = 1 if A else 0  # the next row of keys
    row, address, size, offset, parameter, start = piece_of(
        table,
        items,
        only_address,
        only_size,
        only_offset,
        only_parameter,
        COLUMNS,
        ONLY,
        VECTORS,
    )
    if ONLY:
        column, its_row, columns = only_column, only_row, only_columns
        by_columns, by_rows = only_by_columns.to(tl.int64), only_by_rows.to(tl.int64)
        left, right = only_left.to(tl.int64), only_right.to(tl.int64)
    else:
        column, its_row, columns = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
        by_columns, by_rows = tl.load(row + 8), tl.load(row + 9)
        left, right = tl.load(row + 10), tl.load(row + 11)
    place, element, inside, memory, first = tile_of(
        row,
        only_source,
        address,
        size,
        offset,
        start,
        STORAGE,
        ONLY,
        ALIGNED,
        SOURCE,
        VECTORS,
    )
    if PAIRS:
        weight = unpack(memory, STORAGE)
    else:
        weight = memory.to(COMPUTE)
    down, across = _where(
        (column + start).to(tl.int32),
        its_row.to(tl.int32),
        columns.to(tl.int32),
        by_columns,
        by_rows,
        tl.minimum(size - start, 8 * VECTORS).to(tl.int32),
        ALIGNED,
        VECTORS,
    )
    units = units.to(tl.int64)
    where = factors + left, factors + right, down, across, inside

    a0, a1 = key_of(keys, 0, a0, a1, KEYS_ON_DEVICE and A)
    b0, b1 = key_of(keys, AFTER_A, b0, b1, KEYS_ON_DEVICE)
    nothing = _nothing(weight)
    if A:
        scale = scale_a.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
        a = scale * root_a.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
        at = at_a.to(tl.int64) * units
        moved = weight + _add(
            nothing,
            a,
            at,
            units,
            rank_a,
            where,
            RANK,
            ALIGNED,
            PAIRS,
            VECTORS,
            NATIVE,
        )
        weight = round_coarse(
            moved,
            weight,
            scale,
            coarse_a.to(tl.uint32),
            backs & 1,
            first,
            parameter,
            a0,
            a1,
            COARSE,
            STORAGE,
            PAIRS,
            VECTORS,
        )
        if B or UPDATE:
            weight = on_grid(weight, STORAGE, PAIRS, NATIVE)
    at = at_b.to(tl.int64) * units
    root = root_b.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
    if B:
        scale = scale_b.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
        a = scale * root
        moved = weight + _add(
            nothing,
            a,
            at,
            units,
            rank_b,
            where,
            RANK,
            ALIGNED,
            PAIRS,
            VECTORS,
            NATIVE,
        )
        weight = round_coarse(
            moved,
            weight,
            scale,
            coarse_b.to(tl.uint32),
            backs & 2,
            first,
            parameter,
            b0,
            b1,
            COARSE,
            STORAGE,
            PAIRS,
            VECTORS,
        )
    if UPDATE:
        lr = tl.load(rate).to(COMPUTE)
        delta = tl.zeros_like(weight)
        if MIXED:
            one = 0x3F800000 ^ (size >> 63).to(tl.uint32)  # see gaussian
            for s in range(samples):
                k0, k1 = key_of(keys, s + AFTER_A, b0, b1, True)
                rank = tl.load(keys + 4 * (s + AFTER_A) + 3)
                step = lr * tl.load(coefficients + s).to(COMPUTE)
                if rank > 0:
                    a = step * (1.0 / tl.sqrt(rank.to(tl.float64))).to(COMPUTE)
                    delta = _add(
                        delta, a, at, units, rank, where, 0, ALIGNED, PAIRS, VECTORS, NATIVE
                    )
                elif tl.load(keys + 4 * (s + AFTER_A) + 2) == GAUSSIAN:
                    z = noise_of(first, parameter, k0, k1, one, GAUSSIAN, PAIRS, VECTORS, NATIVE)
                    delta += term_of(step, z, GAUSSIAN)
                else:
                    sign = noise_of(
                        first, parameter, k0, k1, one, RADEMACHER, PAIRS, VECTORS, NATIVE
                    )
                    delta += term_of(step, sign, RADEMACHER)
                at += rank * units
        elif SEVERAL:
            for s in range(samples):
                a = lr * tl.load(coefficients + s).to(COMPUTE) * root
                delta = _add(
                    delta,
                    a,
                    at,
                    units,
                    rank_b,
                    where,
                    RANK,
                    ALIGNED,
                    PAIRS,
                    VECTORS,
                    NATIVE,
                )
                at += rank_b * units
        else:
            a = lr * tl.load(coefficients).to(COMPUTE) * root
            delta = _add(
                delta,
                a,
                at,
                units,
                rank_b,
                where,
                RANK,
                ALIGNED,
                PAIRS,
                VECTORS,
                NATIVE,
            )
        if DECAY:
            decay = lr * weight_decay.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
            delta = tl.where(decay == 0, delta, delta + decay * weight)
        weight -= delta

    memory = final(weight, first, parameter, b0, b1, STOCHASTIC, STORAGE, PAIRS, VECTORS, NATIVE)
    tl.store(place + element, memory, mask=inside)
