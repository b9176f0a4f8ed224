"""Several tensors as one vector: its norm, products, and the vector itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST_SCALE = 1e-2
"""What the root mean square of weights counts as at least: an adapter may start at 0."""


def norm(tensors: Sequence[Tensor]) -> float:
    """Of all together."""
    return math.sqrt(dot(tensors, tensors))


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Summed in float64 over tensors; products are of 32 bits at least."""
    return sum(
        float(torch.sum(_wide(x) * _wide(y), dtype=torch.float64))
        for x, y in zip(a, b, strict=True)
    )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scale_of(parameters: Sequence[Tensor]) -> float:
    """The norm of all, whose root mean square counts as 0.01 at least."""
    size = sum(p.numel() for p in parameters)
    return max(norm([p.detach() for p in parameters]), _LEAST_SCALE * math.sqrt(size))


class Parts:
    """The shapes of tensors, one after the other in a vector of at least fp32.

    Args:
        tensors: at least one; the vector is on the first one's device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._dtype = torch.float32
        for p in tensors:
            self._dtype = torch.promote_types(self._dtype, p.dtype)
        self._device = tensors[0].device
        self._sizes = [p.numel() for p in tensors]

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def size(self) -> int:
        """Elements of the vector."""
        return sum(self._sizes)

    def fit(self, vector: Tensor) -> bool:
        """Whether it is such a vector, on any device."""
        return vector.dtype == self._dtype and vector.numel() == self.size

    def placed(self, vector: Tensor) -> Tensor:
        """On the device of such vectors."""
        return vector.to(self._device)

    def random(self, seed: int) -> Tensor:
        """Normal, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        found = torch.randn(self.size, generator=generator, device="cpu")
        return found.to(self._device, self._dtype)

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1).to(self._device, self._dtype) for t in tensors])

    def split(self, vector: Tensor) -> list[Tensor]:
        pieces = zip(torch.split(vector, self._sizes), self._tensors, strict=True)
        return [piece.view(p.shape).to(p.device, p.dtype) for piece, p in pieces]
