"""torchao's integer weights: tensors that hold integers, scales and zero points within.

A weight is scale * (qdata - zero_point), by row, group or tensor. torchao makes ``Int8Tensor`` of
``Int8WeightOnlyConfig`` and ``IntxUnpackedToInt8Tensor`` of ``IntxWeightOnlyConfig``.

``Int4OpaqueTensor`` of ``PrototypeInt4WeightOnlyConfig`` is for CPUs: scale * (qdata - 8) + zero,
by group, with scales and zeros in one tensor (groups, rows, 2), of the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .formats import Read, is_of

_KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4OpaqueTensor")
_SEPARATE = ("scale", "zero_point")
_OF_ACTIVATIONS = (
    "act_quant_kwargs",
    "act_pre_scale",
    "activation_quantization",
    "act_mapping_type",
)
"""Attributes that say that activations are quantised too."""


class TorchaoTensors:
    title = "torchao weight-only integers"
    keys: tuple[str, ...] = (*_SEPARATE, "scale_and_zero")

    def holds(self, module: nn.Module, parameter: Tensor) -> bool:
        known = is_of(parameter, "torchao", *_KINDS)
        return known and all(getattr(parameter, name, None) is None for name in _OF_ACTIVATIONS)

    def prepare(self, module: nn.Module, parameter: Any) -> str:
        """Scales to fp32: products are as before, since integers of 8 bits times 16 bits fit.

        ``scale_and_zero`` stays, as the product takes it in the inputs' dtype only.
        """
        found = [name for name in _SEPARATE if _is_short(getattr(parameter, name, None))]
        for name in found:
            setattr(parameter, name, getattr(parameter, name).float())
        return "expanded from 16 bits to fp32" if found else ""

    def code(self, parameter: Tensor) -> str:
        return ""

    def scales(self, module: nn.Module, attribute: str) -> Sequence[tuple[str, Read]]:
        learn = [name for name in self.keys if _is_float(_part(module, attribute, name))]
        return [(f"{attribute}.{name}", partial(_part, module, attribute, name)) for name in learn]


def _part(module: nn.Module, attribute: str, name: str) -> Tensor | None:
    return getattr(getattr(module, attribute, None), name, None)


def _is_float(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


def _is_short(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)
