"""The Hessian's trace and Frobenius norm from losses alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..buffers import Buffers
from ..checks import caller_level
from ..evaluation import Closure, averaged
from ..optimizer import HybridZOFO
from .blocks import Block
from .forward import along
from .report import BlockSmoothness, Smoothness
from .sampled import bar, mean_and_error
from .seeing import SeeingShort
from .vectors import scale_of

_RELATIVE_STEP = 1e-2
"""Of the norm of the weights; differences of gradients are taken over shorter ones."""
_NOISY = 0.1
"""A share of the variance that rounding may have before a warning."""


def measure_forward(
    blocks: Sequence[Block],
    closures: Sequence[Closure],
    buffers: Buffers,
    directions: int,
    step: float | None,
    seed: int,
    progress: bool,
) -> Smoothness:
    """See :func:`measure_smoothness`, with ``method="forward"``.

    Raises:
        TypeError: weights have 16 bits, or a closure runs under autocast: second differences of the
            loss are those of rounding.
        FloatingPointError: a loss is not finite.
    """
    for block in blocks:
        for name, p in block.tensors.items():
            if p.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    "target must have float32 or float64 weights where method='forward', got "
                    f"{p.dtype} in {name!r}, in which displacements round; take method='exact', or "
                    "model.float()"
                )
    found, loss = {}, math.nan
    with bar(progress, len(blocks), "blocks") as advance:
        for block in blocks:
            length = step or _RELATIVE_STEP * scale_of(block.parameters)
            mu = length / math.sqrt(block.size)
            optimizer = HybridZOFO([dict(params=block.parameters, mode="zo", lr=0.0, mu=mu)])
            with SeeingShort() as seeing:
                probes = [
                    along(optimizer, averaged(closure), directions, seed, buffers)
                    for closure in closures
                ]
            if seeing.seen:
                raise TypeError(
                    "closure must not compute in 16 bits (weights, or autocast) where "
                    "method='forward': second differences of its loss are those of rounding; "
                    "compute in float32"
                )
            loss = float(torch.stack([a.loss for a in probes]).mean())
            slopes = torch.stack([a.slopes for a in probes]).mean(0)
            curvatures = torch.stack([a.curvatures for a in probes]).mean(0)
            found[block.name] = of_differences(block, slopes, curvatures)
            _check_rounding(block, curvatures, loss, mu, len(closures))
            advance()
    evaluations = len(blocks) * len(closures) * (1 + 2 * directions)
    return Smoothness(loss, "forward", directions, evaluations, found)


def of_differences(block: Block, slopes: Tensor, curvatures: Tensor) -> BlockSmoothness:
    if not bool(torch.isfinite(slopes).all() and torch.isfinite(curvatures).all()):
        raise FloatingPointError(
            f"closure must give finite losses, got one that is not, along {block.name!r}"
        )
    trace, trace_error = mean_and_error(curvatures.tolist())
    count = len(curvatures)
    off = curvatures - curvatures.mean()
    variance = float(off.square().sum()) / (count - 1)
    fourth = float(off.pow(4).mean())
    error = math.sqrt(max(fourth - variance**2 * (count - 3) / (count - 1), 0.0) / count)
    frobenius = math.sqrt(variance / 2)  # Var v'Hv = 2 ||H||_F^2 for Gaussian v
    return BlockSmoothness(
        parameters=block.size,
        gradient_norm=math.sqrt(float(slopes.square().mean())),
        frobenius=frobenius,
        frobenius_error=error / (4 * frobenius) if frobenius else 0.0,
        trace=trace,
        trace_error=trace_error,
        largest=None,
    )


def _check_rounding(
    block: Block, curvatures: Tensor, loss: float, mu: float, closures: int
) -> None:
    """Warn where the spacing of float32 losses makes a part of the second differences' variance."""
    if all(p.dtype == torch.float64 for p in block.parameters):
        return
    spacing = torch.finfo(torch.float32).eps * abs(loss)
    noise = 6 * (spacing / mu**2) ** 2 / closures
    if noise > _NOISY * float(curvatures.var()):
        warnings.warn(
            f"second differences along {block.name!r} are largely the rounding of the loss, so "
            "its Frobenius norm is too large; take a longer step, or method='finite_difference'",
            stacklevel=caller_level(),
        )
