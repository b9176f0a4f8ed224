"""Philox, Box-Muller and signs for the CPU backend, in loops that LLVM vectorises.

Every function fills a buffer that stays in the first-level cache; the formulas are those of
``reference.py``. Polynomials replace log, sin and cos: fitted by reweighted least squares to
near-minimax error (log1p 1.8e-7 relative on [sqrt(1/2), sqrt(2)]; sine and cosine of the half
angle 3e-9 and 5e-8 absolute on [-pi/2, pi/2]).
"""

# mypy: ignore-errors
from __future__ import annotations

import functools
import warnings

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# "contract" lets multiply-adds fuse. Nothing that must be bit-identical between backends may
# use it: see EXACT in cpu_kernels.py.
FAST = {
    "nogil": True,
    "boundscheck": False,
    "error_model": "numpy",
    "fastmath": {"contract"},
}


@functools.cache
def _warn_uncached() -> None:
    warnings.warn(
        "zofo_kernels: numba finds no folder that it may write compiled kernels to, so every "
        "process compiles them anew; set NUMBA_CACHE_DIR to a folder that can be written",
        stacklevel=4,
    )


def compiled(**options):
    """numba's ``njit``; machine code is kept on disk, where a folder for it can be written."""

    def decorate(function):
        try:
            return njit(**options, cache=True)(function)
        except RuntimeError:  # there is none
            _warn_uncached()
            return njit(**options)(function)

    return decorate


_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_MASK, _S32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_F = np.float32
_HALF_STEP = np.float32(np.pi / 512)
_HALF_OFFSET = np.float32(np.pi / 1024)


def _bitcast(source, target, llvm_type):
    @intrinsic
    def cast(typingctx, x):
        def generate(context, builder, signature, args):
            return builder.bitcast(args[0], llvm_type)

        return target(source), generate

    return cast


float_from_bits = _bitcast(types.uint32, types.float32, ir.FloatType())
bits_from_float = _bitcast(types.float32, types.uint32, ir.IntType(32))


def _sign_vector(add_to_memory):
    """Intrinsic (array, start, word, value): 32 elements +-value by the bits of word.

    Written as one LLVM vector operation, since LLVM unrolls the plain loop over 32 bits before
    it could vectorise it. A set bit means -value. With ``add_to_memory`` the signed values are
    added to the array, else stored.
    """

    @intrinsic
    def intrinsic_(typingctx, array, start, word, value):
        signature = types.void(array, types.intp, types.uint32, types.float32)

        def generate(context, builder, signature, args):
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            vector = ir.VectorType(ir.FloatType(), 32)
            pointer = builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer())
            undefined = ir.Constant(vector, ir.Undefined)
            lane0 = builder.insert_element(undefined, args[3], ir.IntType(32)(0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), 32), [0] * 32)
            plus = builder.shuffle_vector(lane0, undefined, zeros)
            minus = builder.fneg(plus)
            mask = builder.bitcast(args[2], ir.VectorType(ir.IntType(1), 32))
            signed = builder.select(mask, minus, plus)
            if add_to_memory:
                load = builder.load(pointer)
                load.align = 4
                signed = builder.fadd(load, signed)
            store = builder.store(signed, pointer)
            store.align = 4
            return context.get_dummy_value()

        return signature, generate

    return intrinsic_


store_signs = _sign_vector(add_to_memory=False)
add_signs = _sign_vector(add_to_memory=True)


@compiled(**FAST)
def philox(words, blocks, first_block, index, stream, key0, key1):
    """words[4 i : 4 i + 4] = Philox4x32-10 of counter first_block + i, for i < blocks."""
    for i in range(blocks):
        block = first_block + np.uint64(i)
        c0, c1 = block & _MASK, block >> _S32
        c2, c3 = np.uint64(index), np.uint64(stream)
        k0, k1 = np.uint64(key0), np.uint64(key1)
        for _ in range(10):
            p0, p1 = _M0 * (c0 & _MASK), _M1 * (c2 & _MASK)
            c0, c1 = (p1 >> _S32) ^ c1 ^ k0, p1 & _MASK
            c2, c3 = (p0 >> _S32) ^ c3 ^ k1, p0 & _MASK
            k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
        words[4 * i] = np.uint32(c0)
        words[4 * i + 1] = np.uint32(c1)
        words[4 * i + 2] = np.uint32(c2)
        words[4 * i + 3] = np.uint32(c3)


@compiled(**FAST)
def gaussian(words, count, z):
    """z[2 i], z[2 i + 1] = the two normals of words[i], for i < count."""
    for i in range(count):
        w = words[i]
        # u 2^24 = 2k + 1 exactly; split as 2^e m with m in [sqrt(1/2), sqrt(2))
        odd = np.int32((np.uint32(w & np.uint32(0x7FFFFF)) << np.uint32(1)) | np.uint32(1))
        t = np.uint32(bits_from_float(_F(odd)) - np.uint32(0x3F3504F3))
        e = np.int32(t >> np.uint32(23)) - np.int32(24)
        m = float_from_bits(np.uint32((t & np.uint32(0x7FFFFF)) + np.uint32(0x3F3504F3)))
        y = m - _F(1)
        p = _F(-0.10081105193572167)
        p = p * y + _F(0.16178987709210166)
        p = p * y + _F(-0.17243021498695096)
        p = p * y + _F(0.1990704444763819)
        p = p * y + _F(-0.24971255648622245)
        p = p * y + _F(0.33334710997995876)
        p = p * y + _F(-0.5000032296720889)
        log_u = _F(0.6931471805599453) * _F(e) + (y * y * p + y)
        radius = np.sqrt(_F(-2) * log_u)
        # half angle h, then cos 2h = 1 - 2 sin^2 h and sin 2h = 2 sin h cos h
        h = _F(np.int32(w) >> np.int32(23)) * _HALF_STEP + _HALF_OFFSET
        h2 = h * h
        s = _F(2.591089692083326e-06)
        s = s * h2 + _F(-0.0001980119427345689)
        s = s * h2 + _F(0.008332904622858794)
        s = s * h2 + _F(-0.16666647916573235)
        s = (s * h2 + _F(0.9999999770247596)) * h
        c = _F(2.3159843652809098e-05)
        c = c * h2 + _F(-0.0013853959544595784)
        c = c * h2 + _F(0.04166361843512399)
        c = c * h2 + _F(-0.4999990673534218)
        c = c * h2 + _F(0.9999999543238262)
        twice = _F(2) * s * radius
        z[2 * i] = radius - twice * s
        z[2 * i + 1] = twice * c


@compiled(**FAST)
def rademacher(words, count, z):
    """z[32 i : 32 i + 32] = +1 or -1 by the bits of words[i], for i < count."""
    for i in range(count):
        store_signs(z, 32 * i, words[i], _F(1))
