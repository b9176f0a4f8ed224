"""Noise of a chunk of weights for the CPU backend, full or of low rank, compiled by numba."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np

from . import distributions
from .cpu_random import FAST, compiled, gaussian, philox, rademacher

CHUNK = 2048  # elements: a multiple of 128, so that chunks start at Philox blocks
GAUSSIAN, RADEMACHER = distributions.GAUSSIAN.code, distributions.RADEMACHER.code
GAUSSIAN_PER_CALL = distributions.GAUSSIAN.elements_per_call
RADEMACHER_PER_CALL = distributions.RADEMACHER.elements_per_call
ROWS, COLUMNS, LEFT, RIGHT = range(4)
"""What ``places`` says of a run: the size of its parameter's matrices, 0 where it has none, and
where in a block of factors row 0 of U and of V would be."""
KEY0, KEY1, KIND, RANK, BLOCK = range(5)
"""What ``keys`` says of a direction: Philox's key, its distribution, its rank or 0, and where its
block of factors begins."""
JOB_PARAMETER, JOB_STREAM, JOB_FIRST, JOB_COUNT, JOB_AT = range(5)
"""What ``jobs`` says of a factor: whose it is, which rows, and where they are in a block."""


@compiled(**FAST)
def noise(kind, words, z, start, count, index, stream, key0, key1):
    """Noise of elements from start on, into z; returns where start lies in z."""
    per_call = GAUSSIAN_PER_CALL if kind == GAUSSIAN else RADEMACHER_PER_CALL
    first = start // np.uint64(per_call)
    lead = np.int64(start - first * np.uint64(per_call))
    blocks = (lead + count + per_call - 1) // per_call
    philox(words, blocks, first, index, stream, key0, key1)
    if kind == GAUSSIAN:
        gaussian(words, 4 * blocks, z)
    else:
        rademacher(words, 4 * blocks, z)
    return lead


@compiled(**FAST)
def fill_factors(factors, units, jobs, keys, low, high):
    """The factors of directions ``low`` to ``high``.

    Args:
        factors: float32. A direction's block has ``units`` rows of U and V for each k: element
            (row, k) is at BLOCK + k * units + JOB_AT + row - JOB_FIRST.
        jobs, keys: int64 (n, 5); see above.
    """
    words = np.empty(CHUNK // 2 + 64, np.uint32)
    z = np.empty(CHUNK + 256, np.float32)
    for d in range(low, high):
        rank, block = keys[d, RANK], keys[d, BLOCK]
        if rank == 0:
            continue
        for job in range(jobs.shape[0]):
            parameter, stream = jobs[job, JOB_PARAMETER], jobs[job, JOB_STREAM]
            first, at = jobs[job, JOB_FIRST] * rank, block + jobs[job, JOB_AT]
            size = jobs[job, JOB_COUNT] * rank
            for done in range(0, size, CHUNK):
                some = min(CHUNK, size - done)
                start = np.uint64(first + done)
                lead = noise(
                    keys[d, KIND],
                    words,
                    z,
                    start,
                    some,
                    parameter,
                    stream,
                    keys[d, KEY0],
                    keys[d, KEY1],
                )
                if rank == 1:
                    factors[at + done : at + done + some] = z[lead : lead + some]
                else:
                    for i in range(some):
                        row, k = (done + i) // rank, (done + i) % rank
                        factors[at + k * units + row] = z[lead + i]


@compiled(**FAST)
def list_terms(key, weight, units, at, weights, bases):
    """Appends a direction's terms to a list of ``at``; returns how many there are then.

    Args:
        key: the direction's row of ``keys``. weight: scale / sqrt(rank).
        weights, bases: of each term, what multiplies it, and where its u would be at unit 0.
    """
    for k in range(key[RANK]):
        weights[at + k] = weight
        bases[at + k] = key[BLOCK] + k * units
    return at + key[RANK]


@compiled(**FAST)
def add_terms(total, weights, bases, terms, factors, place, start, count, new):
    """total += weight u v of elements from ``start`` on, term by term; from 0 where ``new``.

    Four terms go through the elements together, each element's in order.

    Args:
        total: in the compute dtype, at least ``count``.
        weights, bases, terms: see :func:`list_terms`.
        factors: see :func:`fill_factors`. place: the run's row of ``places``.
    """
    rows, columns = place[ROWS], place[COLUMNS]
    row = np.int64(start) // columns
    column = np.int64(start) - row * columns
    done = 0
    while done < count:
        some = min(count - done, columns - column)
        left = place[LEFT] + row
        right = place[RIGHT] + row // rows * columns + column
        part = total[done : done + some]
        t = 0
        if new:
            b = bases[0]
            a, v = weights[0] * factors[b + left], factors[b + right : b + right + some]
            for i in range(some):
                part[i] = a * v[i]
            t = 1
        while t + 4 <= terms:
            b0, b1, b2, b3 = bases[t], bases[t + 1], bases[t + 2], bases[t + 3]
            a0, a1 = weights[t] * factors[b0 + left], weights[t + 1] * factors[b1 + left]
            a2, a3 = weights[t + 2] * factors[b2 + left], weights[t + 3] * factors[b3 + left]
            v0, v1 = (
                factors[b0 + right : b0 + right + some],
                factors[b1 + right : b1 + right + some],
            )
            v2, v3 = (
                factors[b2 + right : b2 + right + some],
                factors[b3 + right : b3 + right + some],
            )
            for i in range(some):
                part[i] = (((part[i] + a0 * v0[i]) + a1 * v1[i]) + a2 * v2[i]) + a3 * v3[i]
            t += 4
        while t < terms:
            b = bases[t]
            a, v = weights[t] * factors[b + left], factors[b + right : b + right + some]
            for i in range(some):
                part[i] += a * v[i]
            t += 1
        done += some
        row += 1
        column = 0
