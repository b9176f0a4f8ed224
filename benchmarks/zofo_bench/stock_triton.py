"""A third baseline, for CUDA: Triton's own generator, as anyone would first write the pass.

Needs triton, so it is imported where it is used.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # 1,024 elements a quarter: 16 bytes a thread of 16-bit weights


@triton.jit
def _add(w_ptr, place, n, scale, z):
    w = tl.load(w_ptr + place, mask=place < n).to(tl.float32)
    tl.store(w_ptr + place, (w + scale * z).to(w_ptr.dtype.element_ty), mask=place < n)


@triton.jit
def randn4x_perturb(w_ptr, n, scale, seed, BLOCK: tl.constexpr):
    """w <- w + scale z on n elements; one call of randn4x serves the quarters of a block."""
    QUARTER: tl.constexpr = BLOCK // 4
    program = tl.program_id(0)
    lane = tl.arange(0, QUARTER)
    place = program.to(tl.int64) * BLOCK + lane
    z0, z1, z2, z3 = tl.randn4x(seed, program * QUARTER + lane)
    _add(w_ptr, place, n, scale, z0)
    _add(w_ptr, place + QUARTER, n, scale, z1)
    _add(w_ptr, place + 2 * QUARTER, n, scale, z2)
    _add(w_ptr, place + 3 * QUARTER, n, scale, z3)


def perturb(tensors: Sequence[Tensor], scale: float, seed: int) -> None:
    """w <- w + scale z in place, one launch a tensor; tensor i is seeded with seed + i."""
    for i, w in enumerate(tensors):
        with torch.cuda.device_of(w):
            randn4x_perturb[(triton.cdiv(w.numel(), BLOCK),)](
                w, w.numel(), scale, seed + i, BLOCK=BLOCK
            )
