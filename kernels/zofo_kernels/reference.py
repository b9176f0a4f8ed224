"""Reference backend: the definition of noise, perturbation and update in plain torch.

This file is the maths. It runs on any device, allocates temporaries, and is slow; every other
backend is tested against it. Integers are carried in int64 tensors, whose products wrap modulo
2^64 and so keep the 64 bits that Philox needs.

A pass works in chunks. A chunk is first computed in temporaries and then written, and writing
needs no memory, so it is done as a whole or not at all. A chunk whose temporaries cannot be
allocated is done in halves, down to ``SMALLEST`` elements; chunks do not affect the result. Where
not even those can be allocated, the pass raises half-way: all chunks before that point are done,
and none after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .backend import replay_in_turn, widest_float
from .direction import (
    ROUNDING_ELEMENTS_PER_CALL,
    STREAM_DIRECTION,
    STREAM_ROUNDING,
    STREAM_SHIFT,
    Direction,
    Shift,
)
from .distributions import BY_NAME, GAUSSIAN
from .program import Program
from .region import Region, passed_of
from .structure import STREAM_LEFT, STREAM_RIGHT, FactorJob

CHUNK = 1 << 18  # elements at a time: bounds the temporaries; a multiple of SMALLEST
SMALLEST = 1 << 10  # elements of a chunk that is not halved; a multiple of 128
_MASK = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011).

    Args:
        counter: four int64 tensors of one shape, values in [0, 2^32).
        key: two 32-bit words.

    Returns:
        four int64 tensors of that shape, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def random_words(
    direction: Direction,
    index: int,
    stream: int,
    first_block: int,
    blocks: int,
    device: torch.device,
) -> Tensor:
    """Philox words of consecutive counters: int64, shape (blocks, 4)."""
    block = torch.arange(blocks, dtype=torch.int64, device=device) + first_block
    fixed = torch.zeros_like(block)
    counter = (block & _MASK, (block >> 32) & _MASK, fixed + index, fixed + stream)
    return torch.stack(philox(counter, direction.key()), dim=1)


def gaussian_from_words(words: Tensor) -> Tensor:
    """Box-Muller, two normals a word: (n, 4) int64 -> (n, 8) float32.

    The low 23 bits k give the radius, u = (2k + 1) / 2^24 in (0, 1); the high 9 bits, signed,
    give the angle (a + 1/2) pi / 256. Element 2w is the cosine and 2w + 1 the sine of word w.
    """
    exact = widest_float(words.device)
    k = (words & 0x7FFFFF).to(exact)
    a = (words >> 23) - ((words >> 31) << 9)
    radius = torch.sqrt(-2.0 * torch.log((2.0 * k + 1.0) * 2.0**-24))
    angle = (a.to(exact) + 0.5) * (math.pi / 256)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1).to(torch.float32)


def rademacher_from_words(words: Tensor) -> Tensor:
    """One bit an element, low bit first, set means -1: (n, 4) int64 -> (n, 128) float32."""
    bit = torch.arange(32, dtype=torch.int64, device=words.device)
    return (1 - 2 * ((words.unsqueeze(-1) >> bit) & 1)).flatten(1).to(torch.float32)


def rounding_bits_from_words(words: Tensor) -> Tensor:
    """Two 16-bit integers a word, low half first: (n, 4) int64 -> (n, 8) int64."""
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)


def _window(per_call: int, start: int, count: int) -> tuple[int, int, int]:
    """The Philox blocks that cover elements [start, start + count): first, number, lead."""
    first, lead = divmod(start, per_call)
    return first, -(-(lead + count) // per_call), lead


def direction_values(
    direction: Direction, index: int, start: int, count: int, device: torch.device
) -> Tensor:
    """Full noise of elements [start, start + count) of a parameter: float32, shape (count,)."""
    return _values(direction, index, STREAM_DIRECTION, start, count, device)


def _values(
    direction: Direction, index: int, stream: int, start: int, count: int, device: torch.device
) -> Tensor:
    distribution = BY_NAME[direction.distribution]
    first, blocks, lead = _window(distribution.elements_per_call, start, count)
    words = random_words(direction, index, stream, first, blocks, device)
    make = gaussian_from_words if distribution is GAUSSIAN else rademacher_from_words
    return make(words).flatten()[lead : lead + count]


def factor_values(
    direction: Direction, index: int, stream: int, first: int, count: int, device: torch.device
) -> Tensor:
    """Rows [first, first + count) of a factor, U or V: float32, shape (count, rank)."""
    rank = direction.rank
    return _values(direction, index, stream, first * rank, count * rank, device).view(count, rank)


def rounding_values(
    direction: Direction,
    index: int,
    start: int,
    count: int,
    device: torch.device,
    stream: int = STREAM_ROUNDING,
) -> Tensor:
    """16 random bits an element for stochastic rounding: int64, shape (count,)."""
    first, blocks, lead = _window(ROUNDING_ELEMENTS_PER_CALL, start, count)
    words = random_words(direction, index, stream, first, blocks, device)
    return rounding_bits_from_words(words).flatten()[lead : lead + count]


def round_stochastic(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 to bf16 or fp16, up with probability equal to the fraction of an ulp.

    Args:
        x: float32, shape (n,).
        bits: uniform integers in [0, 2^16), int64, shape (n,).
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Returns:
        shape (n,), ``dtype``. NaN and infinities pass through; values that fit are exact.
    """
    pattern = x.view(torch.int32).to(torch.int64)
    if dtype == torch.bfloat16:
        rounded = (pattern + bits) & ~0xFFFF
        y = rounded.to(torch.int32).view(torch.float32)
    else:
        rounded = (pattern + (bits >> 3)) & ~0x1FFF
        y = rounded.to(torch.int32).view(torch.float32)
        # Below 2^-14 fp16 is fixed point with steps of 2^-24.
        units = x.abs() * 2.0**24
        whole = units.floor()
        up = (units - whole) * 65536.0 >= (65536 - bits).to(torch.float32)
        tiny = (whole + up.to(torch.float32)) * 2.0**-24
        y = torch.where(x.abs() < 2.0**-14, torch.copysign(tiny, x), y)
    return torch.where(x.isfinite(), y, x).to(dtype)


def round_shift(x: Tensor, w: Tensor, bits: Tensor, back: bool) -> Tensor:
    """Round where a shift takes coarse weights: up with the probability of the fraction.

    The way back from w finds where it came from if it rounds in the same steps. Below a power of
    2 that w has reached or passed from above, steps would be half as wide: on the way back they
    are those around w.

    Args:
        x: where to, float32, shape (n,): at least half as large as w.
        w: where from, bfloat16 or float16, shape (n,).
        bits: uniform integers in [0, 2^16), int64, shape (n,).
        back: whether the shift takes off another one.

    Returns:
        shape (n,), w's dtype. NaN and infinities pass through.
    """
    y = round_stochastic(x, bits, w.dtype)
    if not back:
        return y
    pattern = x.view(torch.int32).to(torch.int64)
    drop = 17 if w.dtype == torch.bfloat16 else 14
    fine = bits * 2 + 1 if w.dtype == torch.bfloat16 else bits >> 2
    wide = (((pattern + fine) >> drop) << drop).to(torch.int32).view(torch.float32)
    larger = w.float().abs().frexp().exponent > x.abs().frexp().exponent
    normal = (x.abs() >= torch.finfo(w.dtype).tiny) & x.isfinite()
    return torch.where(larger & normal, wide.to(w.dtype), y)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 weights, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch has no class of its own for the CPU's allocator and some accelerators'
    message = str(error).lower()
    return "allocate memory" in message or "out of memory" in message


def terms(
    scale: Tensor, direction: Direction, region: Region, start: int, count: int
) -> Iterator[Tensor]:
    """What makes ``scale z`` of elements [start, start + count) when added up: shape (count,).

    Args:
        scale: 0-dim, in the compute dtype, which the terms have too.
        direction: of z.
        region: of which the elements are.
        start: index of the first one in the full parameter.
    """
    index, matrix, device = region.parameter, region.matrix, scale.device
    if not direction.rank or matrix is None:
        yield scale * direction_values(direction, index, start, count, device).to(scale.dtype)
        return
    element = torch.arange(start, start + count, device=device)
    row, column = element // matrix.columns, element % matrix.columns
    column += row // matrix.rows * matrix.columns  # a stack's matrices one after the other
    first, last = int(row[0]), int(row[-1])
    left = factor_values(direction, index, STREAM_LEFT, first, last - first + 1, device)
    low = first // matrix.rows * matrix.columns
    columns = (last // matrix.rows + 1) * matrix.columns - low
    right = factor_values(direction, index, STREAM_RIGHT, low, columns, device)
    root = torch.tensor(1 / math.sqrt(direction.rank), dtype=scale.dtype, device=device)
    for k in range(direction.rank):
        u, v = left[:, k].to(scale.dtype), right[:, k].to(scale.dtype)
        yield scale * root * u[row - first] * v[column - low]


def _write(
    region: Region, source: Tensor, compute: Callable[[Tensor, Region, int], Tensor]
) -> None:
    """region <- compute(w, region, start) for the chunks w of ``source``.

    Args:
        source: what is read: the region's tensor, or one of the same shape and dtype.
        compute: from a flat chunk, its region and the index of its first element in the full
            parameter to a tensor of the chunk's shape and dtype; must not write to the chunk.
    """
    before, after = source.view(-1), region.tensor.view(-1)
    for start, elements, offset in region.runs():
        done, size = 0, CHUNK
        while done < elements:
            low, high = start + done, start + min(done + size, elements)
            chunk = before[low:high]
            try:
                value = compute(chunk, region, offset + done)
            except (MemoryError, RuntimeError) as error:
                if chunk.numel() <= SMALLEST or not _out_of_memory(error):
                    raise
                size = max(chunk.numel() // 2 // SMALLEST, 1) * SMALLEST
                continue
            after[low:high].copy_(value)
            done += size


def _write_each(
    regions: Sequence[Region], compute: Callable[[Tensor, Region, int], Tensor]
) -> None:
    """:func:`_write` in place."""
    passed = passed_of(regions)
    for region in regions:
        _write(region, region.tensor, compute)
        if passed is not None:
            passed(region.tensor)


def _shifted(w: Tensor, shift: Shift, region: Region, start: int) -> Tensor:
    """round(w + scale z), computed in the compute dtype, returned in w's dtype.

    To nearest, but for coarse weights: see ``direction.py``.
    """
    compute, index = compute_dtype(w.dtype), region.parameter
    scale = torch.tensor(shift.scale, dtype=compute, device=w.device)
    first, *others = terms(scale, shift.direction, region, start, w.numel())
    x = w.to(compute) + sum(others, first)
    coarse_from = shift.coarse_from(w.dtype)
    if math.isinf(coarse_from):
        return x.to(w.dtype)
    bits = rounding_values(shift.direction, index, start, w.numel(), w.device, STREAM_SHIFT)
    if shift.scale < 0:
        bits = 0xFFFF - bits
    coarse = w.abs().to(compute) >= coarse_from
    nearest, rounded = x.to(w.dtype), round_shift(x, w, bits, shift.back)
    # nothing comes back from infinity
    return torch.where(coarse & ~rounded.isinf(), rounded, nearest)


def perturb(regions: Sequence[Region], shifts: Sequence[Shift]) -> None:
    """See :meth:`Backend.perturb`."""

    def moved(w: Tensor, region: Region, start: int) -> Tensor:
        for shift in shifts:
            w = _shifted(w, shift, region, start)
        return w

    _write_each(regions, moved)


def perturb_copy(regions: Sequence[Region], sources: Sequence[Tensor], shift: Shift) -> None:
    """See :meth:`Backend.perturb_copy`."""

    def moved(w: Tensor, region: Region, start: int) -> Tensor:
        return _shifted(w, shift, region, start)

    for region, source in zip(regions, sources, strict=True):
        _write(region, source, moved)


def update(
    regions: Sequence[Region],
    directions: Sequence[Direction],
    coefficients: Tensor,
    lr: Tensor,
    weight_decay: float,
    recover: Shift | None,
    stochastic: bool,
) -> None:
    """See :meth:`Backend.update`."""
    factors = {}  # for all dtypes before the first write: see the top of this file
    for compute in {compute_dtype(region.tensor.dtype) for region in regions}:
        rate = lr.to(compute)
        steps = rate * coefficients.to(compute)
        decay = rate * torch.tensor(weight_decay, dtype=compute, device=rate.device)
        factors[compute] = steps.unbind(), decay
    back = None if recover is None else recover.taken_off()

    def updated(w: Tensor, region: Region, start: int) -> Tensor:
        compute, index = compute_dtype(w.dtype), region.parameter
        steps, decay = factors[compute]
        value = (w if back is None else _shifted(w, back, region, start)).to(compute)
        delta = torch.zeros_like(value)
        for direction, step in zip(directions, steps, strict=True):
            for term in terms(step, direction, region, start, w.numel()):
                delta = delta + term
        if weight_decay != 0:
            delta = torch.where(decay == 0, delta, delta + decay * value)
        value = value - delta
        if stochastic and w.dtype in (torch.bfloat16, torch.float16):
            bits = rounding_values(directions[0], index, start, w.numel(), w.device)
            return round_stochastic(value, bits, w.dtype)
        return value.to(w.dtype)

    _write_each(regions, updated)


def replay(regions: Sequence[Region], program: Program, stochastic: bool) -> None:
    """See :meth:`Backend.replay`."""
    replay_in_turn(perturb, update, regions, program, stochastic)


def factors(
    jobs: Sequence[FactorJob], directions: Sequence[Direction], device: torch.device
) -> Tensor:
    """See :meth:`Backend.factors`."""
    made = [[factor_values(d, *job, device).t() for job in jobs] for d in directions]
    return torch.stack([torch.cat(parts, dim=1) for parts in made])


def fill_noise(out: Region, direction: Direction) -> None:
    """See :meth:`Backend.fill_noise`."""

    def noise(w: Tensor, region: Region, start: int) -> Tensor:
        one = torch.ones((), dtype=compute_dtype(w.dtype), device=w.device)
        first, *others = terms(one, direction, region, start, w.numel())
        return sum(others, first).to(w.dtype)

    _write(out, out.tensor, noise)
