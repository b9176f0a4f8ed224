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


def quantise(model: nn.Module, bits: int, names: list[str]) -> None:
    """Give linear layers torchao's weights of integers."""
    quantization: Any = importlib.import_module("torchao.quantization")
    granularities: Any = importlib.import_module("torchao.quantization.granularity")
    dtype = getattr(torch, f"int{bits}")
    for name in names:
        layer: Any = model.get_submodule(name)
        grouped = bits == 4 and layer.in_features % GROUP == 0
        granularity = granularities.PerGroup(GROUP) if grouped else granularities.PerAxis(0)
        config = quantization.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
        quantization.quantize_(nn.Sequential(layer), config)


def taken_apart(model: nn.Module, bits: int, names: list[str]) -> dict[str, Grid]:
    """Grids of quantised layers, which get what their integers stand for as plain weights."""
    grids = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        weight = layer.weight
        m, groups = weight.scale.shape
        integers, scales = weight.qdata.float().view(m, groups, -1), weight.scale.float()[..., None]
        grid = Grid(integers, scales, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if not torch.equal(grid.weight(), weight.dequantize().float()):
            raise RuntimeError(f"{name} must be integers times scales, and is not")
        layer.weight = nn.Parameter(grid.weight(), requires_grad=False)
        grids[name] = grid
    return grids
