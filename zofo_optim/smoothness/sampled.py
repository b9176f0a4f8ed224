"""Random vectors, means over them, and a bar while they are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def drawn(parameters: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Normal random numbers in the parameters' shapes, drawn on the CPU: alike on every device."""
    return [
        torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.device, p.dtype)
        for p in parameters
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


@contextmanager
def bar(
    progress: bool, total: int, unit: str = "directions"
) -> Generator[Callable[[], Any], None, None]:
    """What to call after each of ``total``.

    Raises:
        ImportError: tqdm is missing.
    """
    if not progress:
        yield lambda: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    with tqdm(total=total, desc="smoothness", unit=f" {unit}") as shown:
        yield shown.update
