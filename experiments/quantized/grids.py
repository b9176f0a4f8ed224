"""Weights as torchao quantises them: integers, scales and what they stand for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GROUP = 32
"""Columns that share a scale in 4 bits; a whole row in 8, and where rows do not divide by it."""


@dataclass
class Grid:
    """A weight of integers times scales."""

    integers: Tensor
    """Shape (m, groups, columns of a group), as floats."""
    scales: Tensor
    """(m, groups, 1)."""
    lowest: int
    highest: int

    def weight(self) -> Tensor:
        """(m, n)."""
        return (self.integers * self.scales).flatten(1)

    def round(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """A weight on the grid whose mean is the given one, as far as the grid reaches."""
        steps = weight.view(self.integers.shape) / self.scales
        chance = torch.rand(steps.shape, generator=generator)
        self.integers = (steps + chance).floor_().clamp_(self.lowest, self.highest)
        return self.weight()


def quantised(model: nn.Module, bits: int, names: list[str]) -> dict[str, Grid]:
    """Grids of linear layers, by torchao's own rounding; the model gets what they stand for."""
    quantization: Any = importlib.import_module("torchao.quantization")
    granularities: Any = importlib.import_module("torchao.quantization.granularity")
    grids = {}
    dtype = getattr(torch, f"int{bits}")
    for name in names:
        layer: Any = model.get_submodule(name)
        grouped = bits == 4 and layer.in_features % GROUP == 0
        granularity = granularities.PerGroup(GROUP) if grouped else granularities.PerAxis(0)
        packed = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, bias=False))
        packed[0].weight.data = layer.weight.data.clone()
        config = quantization.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
        quantization.quantize_(packed, config)
        weight: Any = packed[0].weight
        m, groups = weight.scale.shape
        integers = weight.qdata.float().view(m, groups, -1)
        grid = Grid(
            integers, weight.scale.float()[..., None], -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        )
        if not torch.equal(grid.weight(), weight.dequantize().float()):
            raise RuntimeError(f"{name} must be integers times scales, and is not")
        layer.weight.data = grid.weight()
        grids[name] = grid
    return grids
