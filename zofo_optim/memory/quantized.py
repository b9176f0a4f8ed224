"""Linear layers with quantised weights, without data: as many bytes, and the same temporaries.

Formats are those of bitsandbytes, as transformers loads them:

* int4 (nf4, fp4): half a byte an element and an fp32 scale for every 64; with double quantisation
  the scale has a byte, and an fp32 one for every 256 of these. A forward and a backward each make
  a 16-bit copy of the weight for the product.
* int8: a byte an element and an fp32 scale a row. On a GPU the forward multiplies integers, of
  which it has the input's (over fp16) and the output's in 32 bits; elsewhere, and in backwards, it
  makes a copy. The input is kept for the backward, though no gradient needs it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import adapter_parameters

BLOCK, NESTED = 64, 256


def stored_bytes(rows: int, columns: int, weights: str, double_quant: bool) -> int:
    """Of a weight and its scales."""
    elements = rows * columns
    if weights == "int8":
        return elements + 4 * rows
    blocks = math.ceil(elements / BLOCK)
    scales = blocks + 4 * math.ceil(blocks / NESTED) if double_quant else 4 * blocks
    return math.ceil(elements / 2) + scales


class QuantizedLinear(nn.Module):
    """Takes the place of a linear layer on the meta device.

    Args:
        layer: what it replaces.
        weights: "int8" or "int4".
        double_quant: of int4.
        fused: whether int8 multiplies integers.
    """

    def __init__(self, layer: nn.Linear, weights: str, double_quant: bool, fused: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        size = stored_bytes(self.out_features, self.in_features, weights, double_quant)
        packed = torch.empty(size, dtype=torch.uint8, device="meta")
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.int8, self.fused = weights == "int8", fused and weights == "int8"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y.add_(self.bias)

    def copy(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:  # type: ignore[override]
        ctx.layer, ctx.dtype = layer, x.dtype
        ctx.input = x if layer.int8 else None
        if not layer.fused:
            return F.linear(x, layer.copy(x.dtype))
        halves = x.to(torch.float16)
        shape = (*x.shape[:-1], layer.out_features)
        parts = (
            torch.empty(x.shape, dtype=torch.int8, device="meta"),
            torch.empty(shape, dtype=torch.int32, device="meta"),
        )
        out = torch.empty(shape, dtype=x.dtype, device="meta")
        del halves, parts  # all lived at one time
        return out

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.matmul(error, ctx.layer.copy(ctx.dtype).to(error.dtype)), None


def unquantized(model: nn.Module) -> list[str]:
    """Names of the modules that transformers leaves as they are: the head, and what is tied."""
    from transformers.quantizers import base

    home: Any = base
    if not hasattr(base, "get_keys_to_not_convert"):  # transformers 4
        from transformers.integrations import bitsandbytes as home
    found: list[str] = home.get_keys_to_not_convert(model)
    return found


def quantize(
    model: nn.Module, kept: Collection[str], weights: str, *, double_quant: bool, fused: bool
) -> None:
    """Replace linear layers, but those of these names, and an adapter's.

    Args:
        model: on meta, perhaps with an adapter.
        kept: names within the base model.
        weights, double_quant, fused: see :class:`QuantizedLinear`.
    """
    for name, module in linear_of_base(model, kept).items():
        parent, _, last = name.rpartition(".")
        new = QuantizedLinear(module, weights, double_quant, fused)
        setattr(model.get_submodule(parent), last, new)


def linear_of_base(model: nn.Module, kept: Collection[str]) -> dict[str, nn.Linear]:
    """Linear layers by name, but those that are named so, or end with that, and an adapter's."""
    of_adapters = {id(p) for p in adapter_parameters(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and id(module.weight) not in of_adapters
        and not any(name == key or name.endswith(f".{key}") for key in kept)
    }
