"""Rounding in the Triton kernels: from the compute dtype to what is stored, and back."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from . import direction
from .triton_random import rounding_bits

STREAM_ROUNDING = tl.constexpr(direction.STREAM_ROUNDING)
STREAM_SHIFT = tl.constexpr(direction.STREAM_SHIFT)


@triton.jit
def nearest(value, STORAGE: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 or fp64 rounded to nearest, ties to even, in the storage dtype."""
    if NATIVE or STORAGE != tl.bfloat16:
        return value.to(STORAGE)
    else:  # Triton's interpreter truncates
        pattern = value.to(tl.uint32, bitcast=True)
        rounded = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, (pattern >> 16) | 0x40)
        return rounded.to(tl.uint16).to(STORAGE, bitcast=True)


@triton.jit
def pack(low, high, STORAGE: tl.constexpr, NATIVE: tl.constexpr):
    """Two fp32, rounded to nearest in a 16-bit dtype, as one uint32."""
    if NATIVE and STORAGE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.uint32, True, 1
        )
    elif NATIVE:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.uint32, True, 1
        )
    else:
        a = nearest(low, STORAGE, NATIVE).to(tl.uint16, bitcast=True).to(tl.uint32)
        b = nearest(high, STORAGE, NATIVE).to(tl.uint16, bitcast=True).to(tl.uint32)
        return a | (b << 16)


@triton.jit
def unpack(word, STORAGE: tl.constexpr):
    """The inverse of :func:`pack`: (..., 2) fp32."""
    if STORAGE == tl.bfloat16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.uint16).to(STORAGE, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.uint16).to(STORAGE, bitcast=True).to(tl.float32)
    return tl.join(low, high)


@triton.jit
def stored(value, STORAGE: tl.constexpr, PAIRS: tl.constexpr, NATIVE: tl.constexpr):
    """Rounded to nearest, as it is stored."""
    if PAIRS:
        low, high = tl.split(value)
        return pack(low, high, STORAGE, NATIVE)
    else:
        return nearest(value, STORAGE, NATIVE)


@triton.jit
def on_grid(value, STORAGE: tl.constexpr, PAIRS: tl.constexpr, NATIVE: tl.constexpr):
    """Rounded to the grid of the storage dtype, in the compute dtype."""
    if PAIRS:
        return unpack(stored(value, STORAGE, PAIRS, NATIVE), STORAGE)
    else:
        return stored(value, STORAGE, PAIRS, NATIVE).to(value.dtype)


@triton.jit
def stored_stochastic(value, bits, STORAGE: tl.constexpr, PAIRS: tl.constexpr):
    """fp32 rounded stochastically, as it is stored; see reference.round_stochastic."""
    pattern = value.to(tl.uint32, bitcast=True)
    if STORAGE == tl.bfloat16:
        # an infinity's low half is 0, so no carry reaches its exponent; a NaN's may not be
        half = tl.where(value == value, pattern + bits, pattern | 0x400000) >> 16
    else:
        # the exponent's bias differs by 112; past the largest number lies infinity
        half = (((pattern & 0x7FFFFFFF) + (bits >> 3)) >> 13) - (112 << 10)
        half = tl.minimum(half, 0x7C00)
        # below 2^-14 fp16 is fixed point with steps of 2^-24: the bits are the number of steps
        size = tl.abs(value)
        small = size < 6.103515625e-05
        steps = (tl.where(small, size, 0.0) * 1099511627776.0).to(tl.int32).to(tl.uint32)
        half = tl.where(small, (steps + bits) >> 16, half)
        half = tl.where(value == value, half, 0x7E00) | ((pattern >> 16) & 0x8000)
    if PAIRS:
        low, high = tl.split(half)
        return low | (high << 16)
    else:
        return half.to(tl.uint16).to(STORAGE, bitcast=True)


@triton.jit
def coarse_rounded(value, before, bits, back, STORAGE: tl.constexpr):
    """fp32 rounded as reference.round_shift does, in fp32. ``back`` is a scalar, 0 or 1."""
    pattern = value.to(tl.uint32, bitcast=True)
    size, sign = pattern & 0x7FFFFFFF, pattern & 0x80000000
    from_size = before.to(tl.uint32, bitcast=True) & 0x7F800000
    larger = (from_size > (size & 0x7F800000)) & (back != 0)
    if STORAGE == tl.bfloat16:
        up = tl.where(size >= 0x7F800000, pattern, (pattern + bits) & 0xFFFF0000)
        wide = (pattern + 2 * bits + 1) & 0xFFFE0000
        larger = larger & (size >= 0x00800000)
    else:
        up = (size + (bits >> 3)) & 0xFFFFE000
        up = tl.where(up >= 0x47800000, 0x7F800000, up)
        small = size < 0x38800000
        steps = tl.where(small, tl.abs(value), 0.0) * 1099511627776.0
        steps = (steps.to(tl.int32).to(tl.uint32) + bits) >> 16
        tiny = (steps.to(tl.int32).to(tl.float32) * 5.9604644775390625e-08).to(
            tl.uint32, bitcast=True
        )
        up = tl.where(small, tiny, up) | sign
        up = tl.where(size >= 0x7F800000, pattern, up)
        wide = (pattern + (bits >> 2)) & 0xFFFFC000
        larger = larger & (size >= 0x38800000)
    return tl.where(larger, wide, up).to(tl.float32, bitcast=True)


@triton.jit
def round_coarse(
    value,
    before,
    scale,
    coarse_from,
    back,
    first,
    parameter,
    k0,
    k1,
    COARSE: tl.constexpr,
    STORAGE: tl.constexpr,
    PAIRS: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """A shift's values, those of coarse weights rounded to the storage dtype.

    Args:
        value: before + scale z.
        coarse_from: fp32's bits of the size from which on weights are coarse; uint32.
        back: whether the shift takes off another one; 0 or not.
        first, parameter, k0, k1: of the rounding bits; made where the tile has a coarse weight.
    """
    if COARSE:
        coarse = (before.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) >= coarse_from
        if tl.max(coarse.to(tl.int32).reshape(VECTORS * 8), 0) != 0:
            bits = rounding_bits(first, parameter, k0, k1, STREAM_SHIFT, VECTORS)
            if not PAIRS:
                bits = bits.reshape(VECTORS, 8)
            bits = tl.where(scale < 0, 0xFFFF - bits, bits)
            rounded = coarse_rounded(value, before, bits, back, STORAGE)
            # nothing comes back from infinity
            finite = (rounded.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) != 0x7F800000
            value = tl.where(coarse & finite, rounded, value)
    return value


@triton.jit
def final(
    weight,
    first,
    parameter,
    k0,
    k1,
    STOCHASTIC: tl.constexpr,
    STORAGE: tl.constexpr,
    PAIRS: tl.constexpr,
    VECTORS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """What is stored at the end of a pass; the rest is of the rounding bits, where STOCHASTIC."""
    if STOCHASTIC:
        bits = rounding_bits(first, parameter, k0, k1, STREAM_ROUNDING, VECTORS)
        if not PAIRS:
            bits = bits.reshape(VECTORS, 8)
        return stored_stochastic(weight, bits, STORAGE, PAIRS)
    else:
        return stored(weight, STORAGE, PAIRS, NATIVE)
