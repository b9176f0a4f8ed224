"""The noise of the Triton kernels: Philox, Box-Muller, signs and rounding bits, on tiles.

A tile has the shape ``(VECTORS, 4, 2)``: a row is a vector of 8 consecutive elements, four pairs,
since one Philox call makes the Gaussian noise of 8 elements, a pair from each of its 4 words.
Written for few instructions: see ``benchmarks/sass.py``.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix64(x):
    """direction._mix64 on uint64 tensors."""
    x += tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    x = (x ^ (x >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 tensors; k0 and k1 are uint32 scalars."""
    for _ in tl.static_range(10):
        # zero-extended factors: one wide multiplication gives both halves
        p0 = c0.to(tl.uint64) * tl.full((), 0xD2511F53, tl.uint64)
        p1 = c2.to(tl.uint64) * tl.full((), 0xCD9E8D57, tl.uint64)
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _blocks(block, parameter, k0, k1, stream):
    """The four words of Philox blocks ``block``, int64 of any shape."""
    low = block.to(tl.uint32)
    zero = low * 0
    return philox(
        low, (block >> 32).to(tl.uint32), zero + parameter.to(tl.uint32), zero + stream, k0, k1
    )


@triton.jit
def _words(vector, parameter, k0, k1, stream, VECTORS: tl.constexpr):
    """One Philox call a vector: (VECTORS, 4) uint32; the joins move nothing between threads."""
    w0, w1, w2, w3 = _blocks(vector + tl.arange(0, VECTORS), parameter, k0, k1, stream)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(VECTORS, 4)


@triton.jit
def gaussian(vector, parameter, k0, k1, one, stream, VECTORS: tl.constexpr, NATIVE: tl.constexpr):
    """Normals, fp32; see reference.gaussian_from_words.

    Both uniforms are mantissas of numbers in [1, 2), so no integer is converted. The angle is
    turned by pi, and the radius negated, to where the hardware's sin and cos are most accurate.

    Args:
        vector: the first vector, int64: its element is 8 * vector.
        one: the bits of 1.0, uint32, which the compiler must not know: it splits an "and, or"
            of two known masks in two instructions.
        NATIVE: use the GPU's approximations of log2, sqrt, sin and cos.
    """
    word = _words(vector, parameter, k0, k1, stream, VECTORS)
    u = ((word & 0x7FFFFF) | one).to(tl.float32, bitcast=True) - (1.0 - 2.0**-24)
    if NATIVE:
        turn = tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, 127, 9;", "=r,r", [word], tl.uint32, True, 1
        )
    else:
        turn = (word >> 9) | 0x3F800000
    turn = (turn & 0xFFFFC000).to(tl.float32, bitcast=True)
    angle = tl.fma(turn, 6.283185307179586, -6.283185307179586 * (1.5 - 2.0**-10))
    if NATIVE:
        # log2 of a number just below 1 is 0 to within 2^-22, of either sign: take it positive
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1; abs.f32 $0, $0;", "=f,f", [u], tl.float32, True, 1
        )
        square = log2 * 1.3862943611198906
        radius = tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [square], tl.float32, True, 1
        )
        sine = tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1
        )
        cosine = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1
        )
    else:
        radius = tl.sqrt(tl.log2(u) * -1.3862943611198906)
        sine = tl.sin(angle)
        cosine = tl.cos(angle)
    return tl.join(-radius * cosine, -radius * sine)


@triton.jit
def signs(vector, parameter, k0, k1, stream, VECTORS: tl.constexpr):
    """Random signs, in the top bit of uint32 (other bits are anything).

    ``vector`` is a multiple of 16. A word serves 4 vectors: each thread makes one word, and then
    they are exchanged.
    """
    index = tl.arange(0, VECTORS // 4)
    w0, w1, w2, w3 = _blocks((vector >> 4) + (index >> 2), parameter, k0, k1, stream)
    which = index & 3
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    # a gather, as the compiler would rather make every word in every thread than convert
    row = tl.arange(0, VECTORS)
    byte = tl.gather(word, row >> 2, 0) >> ((row & 3) * 8).to(tl.uint32)
    element = tl.arange(0, 4)[:, None] * 2 + tl.arange(0, 2)[None, :]
    return byte[:, None, None] << (31 - element)[None, :, :].to(tl.uint32)


@triton.jit
def rounding_bits(vector, parameter, k0, k1, stream, VECTORS: tl.constexpr):
    """16 random bits an element, uint32."""
    word = _words(vector, parameter, k0, k1, stream, VECTORS)
    return tl.join(word & 0xFFFF, word >> 16)
