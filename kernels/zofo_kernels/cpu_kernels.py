"""The CPU backend's pass over the weights, compiled by numba.

A pass runs over a table of runs (addresses, sizes, parameter indices, offsets) in chunks that
stay in the first-level cache: it makes noise in a buffer, decodes weights to the compute dtype,
applies shifts and update, rounds the result and encodes it. Threads get disjoint element ranges.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .cpu_noise import CHUNK as CHUNK
from .cpu_noise import COLUMNS, KIND, RADEMACHER, RANK, add_terms, list_terms, noise
from .cpu_random import FAST, add_signs, bits_from_float, compiled, float_from_bits, philox

BITS_AT_ONCE = 64  # elements whose shifts get rounding bits if one is coarse: 8 Philox calls
FP32, BF16, FP16, FP64 = 0, 1, 2, 3
_F, _U = np.float32, np.uint32

# The order and number of roundings is part of the definition: no fused multiply-add.
EXACT = {**FAST, "fastmath": False}


@intrinsic
def _pointer(typingctx, address):
    """An integer address as a void pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@compiled(**EXACT)
def _round_bf16(bits):
    """Nearest-even; bits of an fp32, returned as fp32 bits with the low half clear."""
    rounded = _U(bits + _U(0x7FFF) + ((bits >> _U(16)) & _U(1))) & _U(0xFFFF0000)
    return bits if (bits & _U(0x7FFFFFFF)) > _U(0x7F800000) else rounded


@compiled(**EXACT)
def _round_fp16(bits):
    """Nearest-even to fp16's grid; fp32 bits in, fp32 bits out."""
    sign, size = bits & _U(0x80000000), bits & _U(0x7FFFFFFF)
    normal = _U(size + _U(0xFFF) + ((size >> _U(13)) & _U(1))) & _U(0xFFFFE000)
    normal = _U(0x7F800000) if normal >= _U(0x47800000) else normal  # 2^16 and above
    # below 2^-14: adding 0.75 = 1.5 * 2^-1 makes one fp32 ulp 2^-24
    tiny = bits_from_float((float_from_bits(size) + _F(0.75)) - _F(0.75))
    result = tiny if size < _U(0x38800000) else normal
    return bits if size > _U(0x7F800000) else sign | result


@compiled(**EXACT)
def _round_up_bf16(bits, random):
    rounded = _U(bits + random) & _U(0xFFFF0000)
    return bits if (bits & _U(0x7FFFFFFF)) >= _U(0x7F800000) else rounded


@compiled(**EXACT)
def _round_up_fp16(bits, random):
    sign, size = bits & _U(0x80000000), bits & _U(0x7FFFFFFF)
    normal = _U(size + (random >> _U(3))) & _U(0xFFFFE000)
    normal = _U(0x7F800000) if normal >= _U(0x47800000) else normal
    units = float_from_bits(size) * _F(16777216.0)
    whole = np.floor(units)
    up = (units - whole) * _F(65536.0) >= _F(np.int32(65536) - np.int32(random))
    tiny = bits_from_float((whole + (_F(1) if up else _F(0))) * _F(2.0**-24))
    result = tiny if size < _U(0x38800000) else normal
    return bits if size >= _U(0x7F800000) else sign | result


@compiled(**EXACT)
def _round_coarse_bf16(bits, before, random, back):
    """reference.round_shift of one weight; bits of fp32: where to and where from."""
    size, wide = bits & _U(0x7FFFFFFF), _U(bits + _U(2) * random + _U(1)) & _U(0xFFFE0000)
    larger = (before & _U(0x7F800000)) > (size & _U(0x7F800000)) and size >= _U(0x00800000)
    return wide if back and larger else _round_up_bf16(bits, random)


@compiled(**EXACT)
def _round_coarse_fp16(bits, before, random, back):
    size, wide = bits & _U(0x7FFFFFFF), _U(bits + (random >> _U(2))) & _U(0xFFFFC000)
    larger = (before & _U(0x7F800000)) > (size & _U(0x7F800000)) and size >= _U(0x38800000)
    return wide if back and larger else _round_up_fp16(bits, random)


@compiled(**EXACT)
def _decode(code, memory, x, count):
    """Storage to fp32."""
    if code == BF16:
        for i in range(count):
            x[i] = float_from_bits(_U(memory[i]) << _U(16))
    else:
        for i in range(count):
            h = _U(memory[i])
            sign, size = (h & _U(0x8000)) << _U(16), (h & _U(0x7FFF)) << _U(13)
            # the exponent bias differs by 112; the product is exact and handles subnormals
            value = bits_from_float(float_from_bits(size) * _F(2.0**112))
            special = size | _U(0x7F800000)
            x[i] = float_from_bits(sign | (special if size >= _U(0x0F800000) else value))


@compiled(**EXACT)
def _encode(code, x, memory, count):
    """fp32 already on the storage grid, to storage."""
    if code == BF16:
        for i in range(count):
            bits = bits_from_float(x[i])
            nan = (bits & _U(0x7FFFFFFF)) > _U(0x7F800000)
            memory[i] = np.uint16((bits >> _U(16)) | (_U(0x40) if nan else _U(0)))
    else:
        for i in range(count):
            bits = bits_from_float(x[i])
            sign, size = (bits >> _U(16)) & _U(0x8000), bits & _U(0x7FFFFFFF)
            normal = _U(size - _U(0x38000000)) >> _U(13)
            tiny = _U(np.int32(float_from_bits(size) * _F(16777216.0)))
            result = tiny if size < _U(0x38800000) else normal
            result = _U(0x7C00) if size >= _U(0x47800000) else result
            result = _U(0x7E00) if size > _U(0x7F800000) else result
            memory[i] = np.uint16(sign | result)


@compiled(**EXACT)
def _round_nearest(code, x, count):
    if code == BF16:
        for i in range(count):
            x[i] = float_from_bits(_round_bf16(bits_from_float(x[i])))
    elif code == FP16:
        for i in range(count):
            x[i] = float_from_bits(_round_fp16(bits_from_float(x[i])))


@compiled(**EXACT)
def _round_stochastic(code, x, halves, count):
    if code == BF16:
        for i in range(count):
            random = _U(halves[i])
            x[i] = float_from_bits(_round_up_bf16(bits_from_float(x[i]), random))
    else:
        for i in range(count):
            random = _U(halves[i])
            x[i] = float_from_bits(_round_up_fp16(bits_from_float(x[i]), random))


@compiled(**FAST)
def _add_scaled(x, scale, z, count):
    for i in range(count):
        x[i] += scale * z[i]


@compiled(**EXACT)
def _add(x, y, count):
    for i in range(count):
        x[i] = x[i] + y[i]


@compiled(**EXACT)
def _copy(x, to, count):
    for i in range(count):  # assigning a slice is slower by far
        to[i] = x[i]


@compiled(**EXACT)
def _largest(x, low, count):
    """Bits of the largest size among ``count`` elements from ``low`` on."""
    found = _U(0)
    for i in range(low, low + count):
        size = _U(bits_from_float(x[i]) & _U(0x7FFFFFFF))
        found = size if size > found else found
    return found


@compiled(**EXACT)
def _round_some(code, x, before, coarse_from, back, halves, flip, count):
    """Coarse weights stochastically, others to nearest; none to infinity that need not."""
    if code == BF16:
        for i in range(count):
            bits, was = bits_from_float(x[i]), bits_from_float(before[i])
            up = _round_coarse_bf16(bits, was, _U(halves[i]) ^ flip, back)
            coarse = (was & _U(0x7FFFFFFF)) >= coarse_from
            coarse = coarse and (up & _U(0x7FFFFFFF)) != _U(0x7F800000)
            x[i] = float_from_bits(up if coarse else _round_bf16(bits))
    else:
        for i in range(count):
            bits, was = bits_from_float(x[i]), bits_from_float(before[i])
            up = _round_coarse_fp16(bits, was, _U(halves[i]) ^ flip, back)
            coarse = (was & _U(0x7FFFFFFF)) >= coarse_from
            coarse = coarse and (up & _U(0x7FFFFFFF)) != _U(0x7F800000)
            x[i] = float_from_bits(up if coarse else _round_fp16(bits))


@compiled(**FAST)
def _round_shifted(
    code, x, before, z, scale, flip, coarse_from, back, words, start, count, index, key0, key1
):
    """Bits are drawn where a weight is coarse, and these parts done anew; most are fine.

    Args:
        x: fp32 before + scale z, of ``count`` elements from ``start`` on; rounded here.
        flip: what complements the bits of shifts to the negative side, or 0.
        coarse_from, back: see ``run_passes``.
        words: room for the bits.
    """
    _round_nearest(code, x, count)
    for low in range(0, count, BITS_AT_ONCE):
        some = min(BITS_AT_ONCE, count - low)
        if _largest(before, low, some) < coarse_from:
            continue
        first = (start + np.uint64(low)) // np.uint64(8)
        lead = np.int64(start + np.uint64(low) - first * np.uint64(8))
        philox(words, (lead + some + 7) // 8, first, index, 2, key0, key1)
        # low half first: little-endian hosts only, see cpu.py
        halves = words.view(np.uint16)[lead : lead + some]
        here, there = x[low : low + some], before[low : low + some]
        _copy(there, here, some)
        _add_scaled(here, scale, z[low : low + some], some)
        _round_some(code, here, there, coarse_from, back, halves, flip, some)


@compiled(**EXACT)
def _accumulate(total, step, z, count):
    for i in range(count):
        total[i] = total[i] + step * z[i]


@compiled(**EXACT)
def _subtract(x, total, decay, count):
    if decay == 0:
        for i in range(count):
            x[i] = x[i] - total[i]
    else:
        for i in range(count):
            x[i] = x[i] - (total[i] + decay * x[i])


@compiled(**FAST)
def _shift_by_signs(x, words, start, count, index, shifts, scales):
    """fp32 x += +-scale straight from the bits; start must be a multiple of 128."""
    scale = _F(scales[0])
    blocks = (count + 127) // 128
    philox(words, blocks, start // np.uint64(128), index, 0, shifts[0, 0], shifts[0, 1])
    whole = count // 32
    for k in range(whole):
        add_signs(x, 32 * k, words[k], scale)
    for i in range(32 * whole, count):
        bit = (words[i >> 5] >> _U(i & 31)) & _U(1)
        x[i] += -scale if bit else scale


@compiled(**EXACT)
def _same(a, b):
    """Whether two rows of keys are of one direction."""
    return a[0] == b[0] and a[1] == b[1] and a[KIND] == b[KIND] and a[RANK] == b[RANK]


@compiled(**FAST)
def _process(
    code,
    memory,
    x,
    start,
    count,
    index,
    place,
    shifts,
    scales,
    roots,
    coarse,
    keys,
    steps,
    step_roots,
    decay,
    stochastic,
    factors,
    units,
    weights,
    bases,
    words,
    z,
    total,
    before,
):
    """One chunk: memory is the storage; x a buffer, or memory itself where no decoding is."""
    coded = code in (BF16, FP16)
    if coded:
        _decode(code, memory, x, count)
    lead = np.int64(-1)
    for k in range(shifts.shape[0]):
        key, scale = shifts[k], scales[k]
        flip = _U(0xFFFF) if scale < 0 else _U(0)
        low_rank = key[RANK] > 0 and place[COLUMNS] > 0
        stepped = coded and _largest(x, 0, count) >= _U(coarse[k, 0])
        if stepped:
            _copy(x, before, count)
        if low_rank:
            terms = list_terms(key, scale * roots[k], units, 0, weights, bases)
            add_terms(total, weights, bases, terms, factors, place, start, count, True)
            _add(x, total, count)
        else:
            if k == 0 or not _same(key, shifts[k - 1]):
                lead = noise(key[KIND], words, z, start, count, index, 0, key[0], key[1])
            _add_scaled(x, scale, z[lead : lead + count], count)
        if stepped and low_rank:
            _round_shifted(
                code,
                x,
                before,
                total[:count],
                _F(1),
                flip,
                _U(coarse[k, 0]),
                coarse[k, 1] != 0,
                words,
                start,
                count,
                index,
                key[0],
                key[1],
            )
        elif stepped:
            _round_shifted(
                code,
                x,
                before,
                z[lead : lead + count],
                scale,
                flip,
                _U(coarse[k, 0]),
                coarse[k, 1] != 0,
                words,
                start,
                count,
                index,
                key[0],
                key[1],
            )
        elif coded:
            _round_nearest(code, x, count)
    if steps.shape[0] > 0:
        total[:count] = 0
        terms = 0
        for s in range(steps.shape[0]):
            key = keys[s]
            if key[RANK] > 0 and place[COLUMNS] > 0:
                terms = list_terms(key, steps[s] * step_roots[s], units, terms, weights, bases)
                continue
            if terms > 0:  # in order of samples
                add_terms(total, weights, bases, terms, factors, place, start, count, False)
                terms = 0
            same = s == 0 and shifts.shape[0] > 0 and steps.shape[0] == 1
            if not same or not _same(key, shifts[-1]):
                lead = noise(key[KIND], words, z, start, count, index, 0, key[0], key[1])
            _accumulate(total, steps[s], z[lead : lead + count], count)
        if terms > 0:
            add_terms(total, weights, bases, terms, factors, place, start, count, False)
        _subtract(x, total, decay, count)
        if coded:
            if stochastic:
                first = start // np.uint64(8)
                lead = np.int64(start - first * np.uint64(8))
                philox(words, (lead + count + 7) // 8, first, index, 1, keys[0, 0], keys[0, 1])
                # low half first: little-endian hosts only, see cpu.py
                halves = words.view(np.uint16)[lead : lead + count]
                _round_stochastic(code, x, halves, count)
            else:
                _round_nearest(code, x, count)
    if coded:
        _encode(code, x, memory, count)


def _workspace(memory, buffer):
    """Where a chunk is computed: in place for floats, in the buffer for 16-bit storage."""
    raise NotImplementedError("compiled code only")


@overload(_workspace, inline="always")
def _workspace_overload(memory, buffer):
    if memory.dtype == types.uint16:
        return lambda memory, buffer: buffer
    return lambda memory, buffer: memory


@compiled(**FAST)
def run_passes(
    example,
    code,
    addresses,
    sizes,
    indices,
    offsets,
    places,
    begin,
    end,
    shift_ends,
    shifts,
    scales,
    roots,
    coarse,
    key_ends,
    keys,
    steps,
    step_roots,
    decays,
    stochastic,
    factors,
    units,
):
    """All passes over elements [begin, end), chunk by chunk: shifts, then an update if it has one.

    Args:
        example: an empty array of the storage type: float32, float64 or uint16.
        code: FP32, BF16, FP16 or FP64.
        addresses, sizes, indices, offsets, places: the table, one row a run of contiguous
            weights; places: int64 (runs, 4), see ``cpu_noise``.
        begin, end: range in the concatenation of the runs; threads get disjoint ranges.
        shift_ends, key_ends: for each pass, the end of its rows in those below.
        shifts: int64 (k, 5), see ``cpu_noise``: direction of each shift; scales: (k,).
        roots: (k,), 1 / sqrt(rank) of each direction of low rank.
        coarse: int64 (k, 2): the size, in fp32's bits, from which on weights are coarse; whether
            the shift takes off another one.
        keys: int64 (S, 5) likewise for the updates' directions; steps: (S,), lr times c_s.
        step_roots: (S,), likewise.
        decays: for each pass lr times weight decay. stochastic: round 16-bit updates
            stochastically.
        factors, units: see ``fill_factors``; of all directions of low rank.
    """
    words = np.empty(CHUNK // 2, np.uint32)
    z = np.empty(CHUNK, np.float32)
    total = np.empty(CHUNK, scales.dtype)
    before = np.empty(CHUNK, np.float32)
    buffer = np.empty(CHUNK, np.float32)
    most = np.int64(1)
    for k in range(shifts.shape[0]):
        most = max(most, shifts[k, RANK])
    most = max(most, np.sum(keys[:, RANK]))
    weights, bases = np.empty(most, scales.dtype), np.empty(most, np.int64)
    base = 0
    for t in range(sizes.shape[0]):
        low, high = max(begin - base, 0), min(end - base, sizes[t])
        base += sizes[t]
        run = carray(_pointer(addresses[t]), sizes[t], example.dtype)
        while low < high:
            start = np.uint64(offsets[t]) + np.uint64(low)
            lead = np.int64(start % np.uint64(128))
            count = min(high - low, CHUNK - lead)
            memory = run[low : low + count]
            shift, key = 0, 0
            for k in range(shift_ends.shape[0]):
                its_shifts, its_scales, its_roots, its_coarse = (
                    shifts[shift : shift_ends[k]],
                    scales[shift : shift_ends[k]],
                    roots[shift : shift_ends[k]],
                    coarse[shift : shift_ends[k]],
                )
                its_keys, its_steps, its_step_roots = (
                    keys[key : key_ends[k]],
                    steps[key : key_ends[k]],
                    step_roots[key : key_ends[k]],
                )
                shift, key = shift_ends[k], key_ends[k]
                signs_only = (
                    code == FP32
                    and lead == 0
                    and its_steps.shape[0] == 0
                    and its_shifts.shape[0] == 1
                    and its_shifts[0, KIND] == RADEMACHER
                    and (its_shifts[0, RANK] == 0 or places[t, COLUMNS] == 0)
                )
                if signs_only:
                    _shift_by_signs(memory, words, start, count, indices[t], its_shifts, its_scales)
                    continue
                _process(
                    code,
                    memory,
                    _workspace(memory, buffer),
                    start,
                    count,
                    indices[t],
                    places[t],
                    its_shifts,
                    its_scales,
                    its_roots,
                    its_coarse,
                    its_keys,
                    its_steps,
                    its_step_roots,
                    decays[k],
                    stochastic,
                    factors,
                    units,
                    weights,
                    bases,
                    words,
                    z,
                    total,
                    before,
                )
            low += count
