"""The pass over the weights, compiled by Triton: one launch for a table of runs.

A program takes one item, up to ``8 * VECTORS`` elements of one run of contiguous weights: it
loads them, takes the shifts and the update in the compute dtype, rounds and stores.  Nothing is
autotuned, since a kernel that works in place must run once.

Tiles have the shape ``(VECTORS, 4, 2)`` where 16-bit weights are loaded as pairs, two in a
32-bit word; else ``(VECTORS, 8)``.  Threads read and write 16 bytes at a time, except where a
run is not ``ALIGNED``.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from . import direction, distributions
from .triton_random import gaussian, mix64, signs
from .triton_rounding import final, on_grid, round_coarse, unpack

GAUSSIAN = tl.constexpr(distributions.GAUSSIAN.code)
RADEMACHER = tl.constexpr(distributions.RADEMACHER.code)
STREAM_DIRECTION = tl.constexpr(direction.STREAM_DIRECTION)
NONE = tl.constexpr(-1)
MIXED = tl.constexpr(-2)  # an update's directions of both distributions
IN_PLACE, COPY, NO_SOURCE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
COLUMNS = tl.constexpr(5)
"""Of the table, int64: address, elements, offset, parameter, address of the source."""


@triton.jit(
    do_not_specialize=["seed", "step", "sample", "kind", "rank", "count"],
    do_not_specialize_on_alignment=["keys", "device_step"],
)
def keys_kernel(
    keys,
    seed: tl.uint64,
    step: tl.uint64,
    device_step,
    sample: tl.uint64,
    kind: tl.int32,
    rank: tl.int32,
    count: tl.int32,
    version: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """keys[i] <- (Direction(seed, step, sample + i).key(), kind, rank) for i < count, int32."""
    row = tl.arange(0, BLOCK)
    inside = row < count
    if STEP_ON_DEVICE:
        step = tl.load(device_step)
    h = mix64(tl.full((), version, tl.uint64) ^ seed.to(tl.uint64))
    h = mix64(h ^ step.to(tl.uint64))
    h = mix64(h ^ (sample.to(tl.uint64) + row.to(tl.uint64)))
    tl.store(keys + 4 * row, h.to(tl.uint32).to(tl.int32, bitcast=True), mask=inside)
    high = (h >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    tl.store(keys + 4 * row + 1, high, mask=inside)
    tl.store(keys + 4 * row + 2, row * 0 + kind, mask=inside)
    tl.store(keys + 4 * row + 3, row * 0 + rank, mask=inside)


@triton.jit
def key_of(keys, row, k0, k1, ON_DEVICE: tl.constexpr):
    """A direction's key: from its row of ``keys``, or as given."""
    if ON_DEVICE:
        k0 = tl.load(keys + 4 * row).to(tl.uint32, bitcast=True)
        k1 = tl.load(keys + 4 * row + 1).to(tl.uint32, bitcast=True)
        return k0, k1
    else:
        return k0.to(tl.uint32), k1.to(tl.uint32)


@triton.jit
def piece_of(
    table,
    items,
    only_address,
    only_size,
    only_offset,
    only_parameter,
    COLUMNS: tl.constexpr,
    ONLY: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """What a program works on: the run's row, its first four columns, and the piece's start."""
    if ONLY:
        row = table
        address, size = only_address.to(tl.int64), only_size.to(tl.int64)
        offset, parameter = only_offset.to(tl.int64), only_parameter.to(tl.int64)
        start = tl.program_id(0).to(tl.int64) * (8 * VECTORS)
    else:
        item = tl.load(items + tl.program_id(0))
        row = table + COLUMNS * (item & 0xFFFFFFFF)
        address, size = tl.load(row), tl.load(row + 1)
        offset, parameter = tl.load(row + 2), tl.load(row + 3)
        start = (item >> 32) * (8 * VECTORS)
    return row, address, size, offset, parameter, start


@triton.jit
def tile_of(
    row,
    only_source,
    address,
    size,
    offset,
    start,
    STORAGE: tl.constexpr,
    ONLY: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOURCE: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """A tile: pointer and elements past it, which are the run's, what they hold, first vector.

    Args: see :func:`piece_of` and :func:`pass_kernel`.
    """
    PAIRS: tl.constexpr = ALIGNED and STORAGE.primitive_bitwidth == 16
    MEMORY: tl.constexpr = tl.uint32 if PAIRS else STORAGE
    WIDTH: tl.constexpr = 4 if PAIRS else 8
    vector = tl.arange(0, VECTORS)
    element = (vector * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    if ALIGNED:
        left = tl.minimum(size - start, 8 * VECTORS).to(tl.int32)
        inside, _ = tl.broadcast((8 * vector < left)[:, None], element)
    else:
        lead = offset & 127  # pieces start at whole Philox calls, before the run's start
        offset -= lead
        address -= lead * (STORAGE.primitive_bitwidth // 8)
        inside = (start + element >= lead) & (start + element < lead + size)
    begin = start // (8 // WIDTH)
    place = address.to(tl.pointer_type(MEMORY)) + begin
    if ALIGNED:
        place = tl.multiple_of(place, 16)
    if SOURCE == IN_PLACE:
        memory = tl.load(place + element, mask=inside)
    elif SOURCE == COPY:
        if ONLY:
            address = only_source.to(tl.int64)
        else:
            address = tl.load(row + 4)
        if not ALIGNED:
            address -= lead * (STORAGE.primitive_bitwidth // 8)
        source = address.to(tl.pointer_type(MEMORY)) + begin
        if ALIGNED:
            source = tl.multiple_of(source, 16)
        memory = tl.load(source + element, mask=inside)
    else:
        memory = tl.zeros((VECTORS, WIDTH), MEMORY)
    return place, element, inside, memory, (offset + start) >> 3


@triton.jit
def noise_of(
    vector,
    parameter,
    k0,
    k1,
    one,
    KIND: tl.constexpr,
    PAIRS: tl.constexpr,
    VECTORS: tl.constexpr,
    NATIVE: tl.constexpr,
    stream=STREAM_DIRECTION,
):
    """Normals, or signs in the top bit of uint32."""
    if KIND == GAUSSIAN:
        noise = gaussian(vector, parameter, k0, k1, one, stream, VECTORS, NATIVE)
    else:
        noise = signs(vector, parameter, k0, k1, stream, VECTORS)
    if PAIRS:
        return noise
    else:
        return noise.reshape(VECTORS, 8)


@triton.jit
def _flipped(scale, noise, mask):
    """scale with its sign flipped where noise & mask (uint32) has the top bit."""
    if scale.dtype == tl.float64:
        bits = scale.to(tl.uint64, bitcast=True) ^ ((noise & mask).to(tl.uint64) << 32)
        return bits.to(tl.float64, bitcast=True)
    else:
        return (scale.to(tl.uint32, bitcast=True) ^ (noise & mask)).to(tl.float32, bitcast=True)


@triton.jit
def _shifted(weight, scale, noise, KIND: tl.constexpr):
    """weight + scale z, not yet rounded to the storage dtype."""
    if KIND == GAUSSIAN:
        return tl.fma(noise.to(scale.dtype), tl.zeros_like(weight) + scale, weight)
    else:
        return weight + _flipped(scale, noise, 0x80000000)


@triton.jit
def term_of(step, noise, KIND: tl.constexpr):
    """0 + step z, rounded once: never -0, so that no step keeps a weight of -0."""
    if KIND == GAUSSIAN:
        z = noise.to(step.dtype)
        return tl.fma(z, tl.zeros_like(z) + step, tl.zeros_like(z))
    else:
        return _flipped(step, noise, tl.where(step == 0, 0, 0x80000000).to(tl.uint32))


_BY_VALUE = ["a0", "a1", "b0", "b1", "scale_a", "scale_b", "weight_decay", "samples"]
_BY_VALUE += ["coarse_a", "coarse_b", "backs"]
_BY_VALUE += ["only_address", "only_size", "only_offset", "only_parameter", "only_source"]
_POINTERS = ["table", "items", "keys", "coefficients", "rate"]
"""Single numbers are read through them: with their alignment nothing gets faster."""


@triton.jit(do_not_specialize=_BY_VALUE, do_not_specialize_on_alignment=_POINTERS)
def pass_kernel(
    table,
    items,
    keys,
    coefficients,
    rate,
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
    only_address: tl.int64,
    only_size: tl.int64,
    only_offset: tl.int64,
    only_parameter: tl.int64,
    only_source: tl.int64,
    STORAGE: tl.constexpr,
    ONLY: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOURCE: tl.constexpr,
    KIND_A: tl.constexpr,
    KIND_B: tl.constexpr,
    UPDATE: tl.constexpr,
    SAME: tl.constexpr,
    SEVERAL: tl.constexpr,
    DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    KEYS_ON_DEVICE: tl.constexpr,
    COARSE: tl.constexpr,
    VECTORS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Shift a, then shift b or the update; each of them may be NONE.

    Args:
        table: int64, rows of COLUMNS, a row a run.
        items: int64, one a program: the run's row + 2^32 * the piece of it.
        keys: int32 (rows, 4), see keys_kernel: of a, of b and of the update's directions, as far
            as they are; read where KEYS_ON_DEVICE.
        coefficients: floating, (samples,), and rate: floating, one element: the update's.
        a0, a1, b0, b1: key of shift a, and of shift b or the update's direction.
        scale_a, scale_b, weight_decay: bits of doubles: launches pass floats as fp32.
        coarse_a, coarse_b: of the shifts, fp32's bits of the size from which on weights are
            coarse; read where COARSE. backs: 1 where a takes off another shift, + 2 where b does.
        only_address ... only_source: the row of the only run, where ONLY: nothing is made on
            the device for one pass.
        KIND_A, KIND_B, UPDATE: distribution of the shifts and of the update's directions.
        SAME: b, or the update, is along the direction of a.
        SEVERAL: the update has several directions (or keys only known on the device).
        SOURCE: read the weights from where they are written, elsewhere, or not at all (zeros).
        ALIGNED: addresses divide by 16, sizes by 8, and offsets by the elements of a Philox call:
            8, or 128 where there are signs.
    """
    COMPUTE: tl.constexpr = tl.float64 if STORAGE == tl.float64 else tl.float32
    PAIRS: tl.constexpr = ALIGNED and STORAGE.primitive_bitwidth == 16
    AFTER_A: tl.constexpr = 1 if KIND_A != NONE else 0  # the next row of keys
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
    one = 0x3F800000 ^ (size >> 63).to(tl.uint32)  # see gaussian
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

    a0, a1 = key_of(keys, 0, a0, a1, KEYS_ON_DEVICE and KIND_A != NONE)
    b0, b1 = key_of(keys, AFTER_A, b0, b1, KEYS_ON_DEVICE)
    if KIND_A != NONE:
        noise = noise_of(first, parameter, a0, a1, one, KIND_A, PAIRS, VECTORS, NATIVE)
        scale = scale_a.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
        moved = _shifted(weight, scale, noise, KIND_A)
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
        if KIND_B != NONE or UPDATE != NONE:
            weight = on_grid(weight, STORAGE, PAIRS, NATIVE)
    if KIND_B != NONE:
        if not SAME:
            noise = noise_of(first, parameter, b0, b1, one, KIND_B, PAIRS, VECTORS, NATIVE)
        scale = scale_b.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
        moved = _shifted(weight, scale, noise, KIND_B)
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
    if UPDATE != NONE:
        lr = tl.load(rate).to(COMPUTE)
        if SEVERAL:
            delta = tl.zeros_like(weight)
            for s in range(samples):
                k0, k1 = key_of(keys, s + AFTER_A, b0, b1, True)
                step = lr * tl.load(coefficients + s).to(COMPUTE)
                # not "noise": shift a's may be of another type, and a loop's names keep theirs
                if UPDATE != MIXED:
                    drawn = noise_of(first, parameter, k0, k1, one, UPDATE, PAIRS, VECTORS, NATIVE)
                    delta += term_of(step, drawn, UPDATE)
                elif tl.load(keys + 4 * (s + AFTER_A) + 2) == GAUSSIAN:
                    z = noise_of(first, parameter, k0, k1, one, GAUSSIAN, PAIRS, VECTORS, NATIVE)
                    delta += term_of(step, z, GAUSSIAN)
                else:
                    sign = noise_of(
                        first, parameter, k0, k1, one, RADEMACHER, PAIRS, VECTORS, NATIVE
                    )
                    delta += term_of(step, sign, RADEMACHER)
        else:
            if not SAME:
                noise = noise_of(first, parameter, b0, b1, one, UPDATE, PAIRS, VECTORS, NATIVE)
            delta = term_of(lr * tl.load(coefficients).to(COMPUTE), noise, UPDATE)
        if DECAY:
            decay = lr * weight_decay.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
            delta = tl.where(decay == 0, delta, delta + decay * weight)
        weight -= delta

    memory = final(weight, first, parameter, b0, b1, STOCHASTIC, STORAGE, PAIRS, VECTORS, NATIVE)
    tl.store(place + element, memory, mask=inside)
