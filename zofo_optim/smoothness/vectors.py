"""Several tensors as one vector, on their device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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

    def fit(self, vector: Tensor) -> bool:
        """Whether it is such a vector, on any device."""
        return vector.dtype == self._dtype and vector.numel() == sum(self._sizes)

    def placed(self, vector: Tensor) -> Tensor:
        """On the device of such vectors."""
        return vector.to(self._device)

    def random(self, seed: int) -> Tensor:
        """Normal, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        found = torch.randn(sum(self._sizes), generator=generator, device="cpu")
        return found.to(self._device, self._dtype)

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1).to(self._device, self._dtype) for t in tensors])

    def split(self, vector: Tensor) -> list[Tensor]:
        pieces = zip(torch.split(vector, self._sizes), self._tensors, strict=True)
        return [piece.view(p.shape).to(p.device, p.dtype) for piece, p in pieces]
