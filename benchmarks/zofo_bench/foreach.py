"""A second baseline: MeZO's passes written with torch's multi-tensor operations.

Noise is drawn tensor by tensor from a seeded generator, all before it is used: temporaries as
large as the weights. Restore and update draw it once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _normals(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    return [
        torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device) for t in tensors
    ]


def perturb(tensors: Sequence[Tensor], scale: float, seed: int) -> None:
    """w <- w + scale z."""
    torch._foreach_add_(list(tensors), _normals(tensors, seed), alpha=scale)


def restore_and_update(
    tensors: Sequence[Tensor],
    scale: float,
    projected_grad: float,
    lr: float,
    seed: int,
    weight_decay: float,
) -> None:
    """w <- w + scale z, then w <- w - lr (projected_grad z + weight_decay w)."""
    weights, z = list(tensors), _normals(tensors, seed)
    torch._foreach_add_(weights, z, alpha=scale)
    if weight_decay:
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_add_(weights, z, alpha=-lr * projected_grad)
