"""torchao's integer weights: tensors that hold integers, scales and zero points within.

A weight is scale * (qdata - zero_point), by row, group or tensor. torchao makes ``Int8Tensor`` of
``Int8WeightOnlyConfig`` and ``IntxUnpackedToInt8Tensor`` of ``IntxWeightOnlyConfig``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .formats import Read, is_of

_LEARN = ("scale", "zero_point")
_OF_ACTIVATIONS = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")
"""Attributes that say that activations are quantised too."""


class TorchaoTensors:
    title = "torchao weight-only integers"

    def holds(self, module: nn.Module, parameter: Tensor) -> bool:
        known = is_of(parameter, "torchao", "Int8Tensor", "IntxUnpackedToInt8Tensor")
        return known and all(getattr(parameter, name, None) is None for name in _OF_ACTIVATIONS)

    def prepare(self, module: nn.Module, parameter: Any) -> str:
        """Scales to fp32: products are as before, since integers of 8 bits times 16 bits fit."""
        found = [name for name in _LEARN if _is_short(getattr(parameter, name))]
        for name in found:
            setattr(parameter, name, getattr(parameter, name).float())
        return "expanded from 16 bits to fp32" if found else ""

    def scales(self, module: nn.Module, attribute: str) -> Sequence[tuple[str, Read]]:
        def reader(name: str) -> Read:
            return lambda: getattr(getattr(module, attribute), name, None)

        return [(f"{attribute}.{name}", reader(name)) for name in _LEARN]


def _is_short(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)
