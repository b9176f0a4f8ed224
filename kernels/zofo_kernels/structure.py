"""The structure of a direction: which parameters are matrices, and what low rank means there.

A direction of rank r >= 1 has, for each m x n matrix,

    z = sum_k u_k v_k^T / sqrt(r),    k = 0, ..., r - 1,

with columns u_k of U (m x r) and v_k of V (n x r), whose elements are independent and have the
direction's distribution; so E[z] = 0 and E[z z^T] = I, as with full noise. All other parameters
have full noise. A stack of matrices has U and V for each of them. Element (i, k) of U is number
i r + k of the stream ``STREAM_LEFT``, element (j, k) of V number j r + k of ``STREAM_RIGHT``; in
the e-th matrix of a stack, i counts on from e m and j from e n. These are the rows and columns of
the full parameter, so that shards agree.

Where a z is used, the terms (scale / sqrt(r)) u_ik v_jk are added one after the other, k from 0
on, in the compute dtype, which ``scale`` and ``1 / sqrt(r)`` are first rounded to. Factors of +1
and -1 make the products exact, so that every backend gives the same bits.

All this is under the noise version: 2 has it, 1 has full noise only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

STRUCTURES = ("full", "low_rank")
"""What users call them."""
STREAM_LEFT = 3
STREAM_RIGHT = 4


class Matrix(NamedTuple):
    """How a parameter's elements make a matrix, or a stack of matrices of one size."""

    rows: int
    """Of one matrix."""
    columns: int


class FactorJob(NamedTuple):
    """Rows of a parameter's U or V that are to be made."""

    parameter: int
    stream: int
    first: int
    rows: int


def matrix_of(shape: Sequence[int]) -> Matrix | None:
    """What a direction of low rank takes a parameter of this shape for; None: full noise.

    Shape (m, n) is a matrix, (E, m, n) a stack of E of them (experts), and with more dimensions
    (o, ...) is a matrix with o rows (the kernels of a convolution). A single row or column is a
    vector: so are the parts of a stack of these.
    """
    if len(shape) < 2:
        return None
    rows, columns = shape[-2:] if len(shape) == 3 else (shape[0], math.prod(shape[1:]))
    return Matrix(rows, columns) if min(rows, columns) > 1 else None
