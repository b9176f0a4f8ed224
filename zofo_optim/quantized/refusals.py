"""Quantised weights whose scales cannot learn here, and how they are told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zofo_kernels._torch_compat import is_wrapper_subclass

from ..sharding import is_sharded
from .formats import formats

KNOWN = (
    "bitsandbytes 4-bit and 8-bit, torchao Int8WeightOnlyConfig, IntxWeightOnlyConfig and "
    "PrototypeInt4WeightOnlyConfig"
)
_METHODS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "torchao")
"""What transformers calls the libraries of these formats."""
_PACKED = ("qweight", "W_q", "qzeros", "codebooks")
"""What modules of other libraries call their integers: GPTQ, AWQ, HQQ, AQLM."""


def check_known(model: nn.Module) -> None:
    """
    Raises:
        ValueError: weights are quantised by another library, where scales are not parameters that
            could be refused one by one.
    """
    for module in model.modules():
        method = _method_of(module)
        if method is not None and method not in _METHODS:
            raise ValueError(
                f"model must be quantised by {KNOWN} where quantized='scales', got one of "
                f"quant_method={method!r}: load it unquantised, or pass quantized='frozen'"
            )
    for name, module in model.named_modules():
        found = next((part for part in _PACKED if isinstance(_part(module, part), Tensor)), None)
        if found is not None:
            raise ValueError(
                f"model must be quantised by {KNOWN} where quantized='scales', got a "
                f"{type(module).__name__} that holds {found!r} in {name!r}: load it unquantised, "
                "or pass quantized='frozen'"
            )


def _part(module: nn.Module, name: str) -> object:
    return module._parameters.get(name, module._buffers.get(name))


def _method_of(module: nn.Module) -> str | None:
    config: Any = getattr(getattr(module, "config", None), "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method))


def is_of_bitsandbytes(parameter: Tensor) -> bool:
    """By its type, or by the attributes that a pickled model's plain parameters have too."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params") or any(
        hasattr(parameter, name) for name in ("quant_state", "has_fp16_weights")
    )


def is_quantised(parameter: Tensor) -> bool:
    """Whether a weight is held as integers or 8-bit floats with scales."""
    if is_of_bitsandbytes(parameter):
        return True
    if is_sharded(parameter):
        return False
    return is_wrapper_subclass(parameter) or (
        parameter.is_floating_point() and parameter.dtype.itemsize < torch.float16.itemsize
    )


def by_choice(parameter: Tensor) -> str:
    """What else could be done with a weight that is refused, for a message."""
    known = any(format.holds(nn.Module(), parameter) for format in formats())
    scales = "train their scales by quantized='scales', " * known
    others = (
        "train updates of low rank beside them by quantized='low_rank', keep them as they are by "
        "quantized='frozen', "
    )
    return scales + others * is_quantised(parameter)
