"""torchao's weights of integers, without data: its own tensors and products, on the meta device."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from zofo_kernels._torch_compat import is_wrapper_subclass

from .quantized import linear_of_base

_CONFIGS = ("Int8WeightOnlyConfig", "IntxWeightOnlyConfig")


def is_torchao(weights: Any) -> bool:
    """Whether a value of ``weights=`` is a configuration of torchao's that is known here."""
    kind = type(weights)
    return kind.__name__ in _CONFIGS and kind.__module__.split(".")[0] == "torchao"


def said_of(weights: Any) -> str:
    """For a line: ``weights=`` as it is, or which configuration of torchao's."""
    if not is_torchao(weights):
        return str(weights)
    dtype = getattr(weights, "weight_dtype", None)
    found = "int8" if dtype is None else str(dtype).removeprefix("torch.")
    return f"{found} (torchao)"


def quantize(model: nn.Module, kept: Collection[str], weights: Any) -> None:
    """Give linear layers torchao's weights, but those of these names.

    Args:
        model: on meta, in the dtype that it computes in.
        kept: see :func:`linear_of_base`.
        weights: the configuration.

    Raises:
        What torchao raises where a layer does not fit, such as one that groups do not divide.
    """
    from torchao.quantization import quantize_

    chosen = {id(module) for module in linear_of_base(model, kept).values()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, weights, lambda module, name: id(module) in chosen)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Those that a tensor holds in place of data; itself where it has its own."""
    if not is_wrapper_subclass(tensor):
        yield tensor
        return
    held: Any = tensor
    for name in held.__tensor_flatten__()[0]:
        if (inner := getattr(held, name, None)) is not None:
            yield from plain_tensors(inner)
