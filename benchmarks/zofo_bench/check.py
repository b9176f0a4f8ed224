"""Checks that must pass before anything is timed: against the reference backend, on windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zofo_kernels import Weights

from .registry import WrongResult

NOISE_TOLERANCE = 5e-4
"""Largest difference of a Gaussian value between backends; Rademacher values are equal."""


Operation = Callable[..., None]
"""A pass of zofo_kernels: takes weights, and ``indices``, ``offsets``, ``backend`` by keyword."""


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gap between numbers of ``dtype`` at the size of x, as float64."""
    info = torch.finfo(dtype)
    size = x.double().abs().clamp(min=info.smallest_normal)
    return torch.exp2(torch.floor(torch.log2(size))) * info.eps


def require_close(
    what: str,
    before: Tensor,
    got: Tensor,
    expected: Tensor,
    *,
    noise: float,
    ulps: float,
    reach: float = 0.0,
) -> None:
    """Raise where |got - expected| > noise * NOISE_TOLERANCE + ulps anywhere, or is NaN.

    Args:
        what: for the message.
        before, got, expected: the weights before, and after by the backend and its reference.
        noise: the largest factor that multiplies a noise value; 0 asks for equal noise.
        ulps: roundings that may fall differently, in gaps between numbers of the weights' size.
        reach: how far weights are from both on the way; adds to that size.
    """
    error = (got.double() - expected.double()).abs()
    size = torch.maximum(before.double().abs(), expected.double().abs()) + reach
    wrong = ~(error <= noise * NOISE_TOLERANCE + ulps * ulp(size, got.dtype))
    if wrong.any():
        worst = error[wrong].max().item()
        raise WrongResult(
            f"{what}: {int(wrong.sum())} of {got.numel()} checked values differ from the "
            f"reference, by up to {worst:.3g}"
        )


def require_displacement(
    what: str, run: Callable[[], object], tensors: Sequence[Tensor], scale: float
) -> None:
    """Raise where ``run`` does not add noise of mean 0 and deviation ``scale``: for baselines.

    To within 5 %, or what chance does with fewer than 10,000 elements.
    """

    def some() -> Tensor:
        return torch.cat([t.detach().view(-1)[:100_000].double() for t in tensors[:10]])

    before = some()
    run()
    after = some()
    moved = (after - before) / scale
    allowed = max(0.05, 5 / moved.numel() ** 0.5)
    mean, deviation = float(moved.mean()), float(moved.std())
    if not (abs(mean) <= allowed and abs(deviation - 1) <= allowed):
        raise WrongResult(f"{what}: noise has mean {mean:.3g} and deviation {deviation:.3g}")


def windows(count: int, width: int, number: int) -> list[tuple[int, int]]:
    """Evenly spread ranges [start, end) of [0, count): first, last, across the middle, others."""
    if count <= width * number:
        return [(0, count)]
    starts = [round(i * (count - width) / (number - 1)) for i in range(number)]
    return [(start, start + width) for start in [*starts, (count - width) // 2]]


def check_operation(
    what: str,
    operation: Operation,
    weights: Weights,
    *,
    noise: float,
    ulps: float,
    reach: float = 0.0,
    width: int = 4096,
    number: int = 8,
) -> None:
    """Run ``operation`` on the whole weights, and its reference on windows of them; compare."""
    tensors = weights.tensors
    pieces = [
        (i, start, end)
        for i, tensor in enumerate(tensors)
        for start, end in windows(tensor.numel(), width, number)
    ]
    before = [tensors[i].view(-1)[start:end].clone() for i, start, end in pieces]
    expected = [piece.clone() for piece in before]
    operation(weights)
    operation(
        expected,
        indices=[i for i, _, _ in pieces],
        offsets=[start for _, start, _ in pieces],
        backend="reference",
    )
    got = torch.cat([tensors[i].view(-1)[start:end] for i, start, end in pieces])
    require_close(
        what, torch.cat(before), got, torch.cat(expected), noise=noise, ulps=ulps, reach=reach
    )
