"""bitsandbytes' 4-bit weights: blocks of NF4 or FP4 codes, each with its largest magnitude.

A weight is absmax[block] * code[q]. The scales, ``absmax`` (blocks,), are in the weight's
``quant_state``, and in state dicts as ``weight.absmax``.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .formats import Read, is_of

_PACKS = "support_avx512bf16_for_cpu"
"""Of a module: whether evaluations without gradients repack weights, where the CPU has bf16."""


def settle_layer(module: nn.Module) -> str:
    """Of ``Linear4bit``: what its first evaluation would change is so now, or never; others pass.

    - Weights are, and stay, as training and state dicts have them. On CPUs with AVX512-BF16 an
      evaluation in ``eval()`` mode packs them anew, with scales of 16 bits in a tensor of their
      own. Products with such weights have no derivatives: an adapter would get no gradients.
    - A bias gets the dtype that the layer was told to compute in, as ``BitsAndBytesConfig`` tells
      it: fp32, unless it has another. Earlier versions than 0.50 cast biases to that of inputs.

    Returns:
        What was done to the weight's scales; "" for nothing.
    """
    if hasattr(module, _PACKS):
        setattr(module, _PACKS, False)
    layer: Any = module
    told = getattr(layer, "compute_type_is_set", False) and layer.bias is not None
    if told and _casts_biases():
        layer.bias.data = layer.bias.data.to(layer.compute_dtype)
    said = ""
    for parameter in module.parameters(recurse=False):
        state = getattr(parameter, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            _unpack(parameter, state)
            said = "unpacked from the CPU layout, where they were rounded to 16 bits"
    return said


@functools.cache
def _casts_biases() -> bool:
    """Whether a layer's first evaluation gives its bias the dtype that it computes in."""
    major, minor = importlib.metadata.version("bitsandbytes").split(".")[:2]
    return (int(major), int(minor)) >= (0, 50)


class Bnb4bit:
    title = "bitsandbytes 4-bit"
    keys: tuple[str, ...] = ("absmax",)

    def holds(self, module: nn.Module, parameter: Tensor) -> bool:
        """Also a plain parameter with the state, as in models that were pickled."""
        return is_of(getattr(parameter, "quant_state", None), "bitsandbytes", "QuantState")

    def prepare(self, module: nn.Module, parameter: Any) -> str:
        """Scales to fp32, weights to the layout that training and state dicts use.

        They keep it, as what learns would else no longer be what the module uses.
        """
        said, state = settle_layer(module), parameter.quant_state
        if state.nested:
            state.absmax = _expanded(state)
            _no_longer_nested(parameter, state)
            said = "expanded from 8 bits (double quantisation) to fp32"
        elif state.absmax.dtype != torch.float32:
            state.absmax = state.absmax.float()
            said = "expanded to fp32"
        return said

    def code(self, parameter: Any) -> str:
        return str(parameter.quant_state.quant_type)

    def scales(self, module: nn.Module, attribute: str) -> Sequence[tuple[str, Read]]:
        return [(f"{attribute}.absmax", partial(_absmax, module, attribute))]


def _absmax(module: nn.Module, attribute: str) -> Tensor | None:
    state = getattr(getattr(module, attribute, None), "quant_state", None)
    return getattr(state, "absmax", None)


def _expanded(state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    # as bitsandbytes itself does in each product
    absmax: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return absmax.float()


def _no_longer_nested(parameter: Any, state: Any) -> None:
    state.nested, state.state2, state.offset = False, None, None
    parameter.compress_statistics = False


def _unpack(parameter: Any, state: Any) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    absmax = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # bitsandbytes would quantise the scales anew
    parameter.data, parameter.quant_state = _convert_weight_packed_for_cpu_inverse(
        parameter.data, state
    )
    parameter.quant_state.absmax = absmax
    _no_longer_nested(parameter, parameter.quant_state)
