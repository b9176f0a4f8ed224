"""Side updates without data: of the sizes that they have, and with their arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantized.side_module import Features, SideUpdate, attach, features_of
from ..quantized.side_updates import holds_packed, linear_layers


class RehearsedSide(SideUpdate):
    """Nothing is drawn.

    Args:
        features, rank: see :class:`SideUpdate`.
        promotes: whether a sum of two dtypes copies the narrower one first, as on a CPU.
    """

    def __init__(self, features: Features, rank: int, promotes: bool) -> None:
        nn.Module.__init__(self)
        self.rank, self.seed, self._promotes = rank, 0, promotes
        left = torch.empty(features.outputs, rank, device="meta")
        self.register_parameter(self.parameter, nn.Parameter(left, requires_grad=False))
        self.register_buffer("right", torch.empty(features.inputs, rank, device="meta"))

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        if not self._promotes:
            return super().forward(x, output)
        moved = F.linear(x.to(self.right.dtype) @ self.right, self.left)
        return (output.to(moved.dtype) + moved).to(output.dtype)


def add_side_updates(model: nn.Module, rank: int, *, promotes: bool) -> None:
    """Beside each quantised linear layer of a model on meta, perhaps with an adapter.

    Args:
        model: it is changed.
        rank, promotes: see :class:`RehearsedSide`.
    """
    for module in linear_layers(model).values():
        features = features_of(module)
        if features is not None and holds_packed(module):
            attach(module, RehearsedSide(features, rank, promotes))
