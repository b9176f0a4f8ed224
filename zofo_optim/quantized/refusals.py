"""Quantised weights whose scales cannot learn here, and how they are told."""

from __future__ import annotations

from collections.abc import Iterator
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
_OTHERWISE = (
    "load it unquantised, train updates of low rank beside it by quantized='low_rank', or keep it "
    "as it is by quantized='frozen'"
)


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
                f"quant_method={method!r}: {_OTHERWISE}"
            )
    for name, module, found in packed_modules(model):
        raise ValueError(
            f"model must be quantised by {KNOWN} where quantized='scales', got a "
            f"{type(module).__name__} that holds {found!r} in {name!r}: {_OTHERWISE}"
        )
    if not any(map(is_quantised, model.parameters())):
        raise ValueError(
            f"model must be quantised by {KNOWN} where quantized='scales', got one without "
            "quantised weights: leave quantized out, and all of it trains as it is"
        )


def packed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Modules that hold weights as another library packs them: name, module, and what tells."""
    for name, module in model.named_modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        held = {part for part, tensor in own if isinstance(tensor, Tensor)}
        found = next((part for part in _PACKED if part in held), None)
        if found is not None and (found != "codebooks" or "codes" in held):
            yield name, module, found


def said_of_nothing(name: str, module: nn.Module, found: str) -> str:
    """A message for one of :func:`packed_modules`, without a choice what becomes of it."""
    return (
        f"model must not have quantised weights unless quantized= says what becomes of them, got a "
        f"{type(module).__name__} that holds {found!r} in {name!r}: {_OTHERWISE}, or leave it out "
        "by exclude="
    )


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
