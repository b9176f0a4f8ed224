"""bitsandbytes' 8-bit weights (LLM.int8()): a row of integers, with its largest magnitude.

A weight is SCB[row] * q / 127. The scales, ``SCB`` (rows,), fp32, are the weight's attribute until
the first evaluation, which hands the same tensor to the module's ``state``; in state dicts they
are the module's ``SCB``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .formats import Read


class Bnb8bit:
    title = "bitsandbytes 8-bit"
    keys: tuple[str, ...] = ("SCB",)

    def holds(self, module: nn.Module, parameter: Tensor) -> bool:
        """Not with ``has_fp16_weights``, which is quantised anew in each evaluation.

        Also a plain parameter with the attributes, as in models that were pickled.
        """
        packed = hasattr(parameter, "has_fp16_weights") and parameter.dtype == torch.int8
        return packed and _of(module, parameter) is not None

    def prepare(self, module: nn.Module, parameter: Tensor) -> str:
        return ""

    def code(self, parameter: Tensor) -> str:
        return ""

    def scales(self, module: nn.Module, attribute: str) -> Sequence[tuple[str, Read]]:
        return [("SCB", partial(_scales, module, attribute))]


def _scales(module: nn.Module, attribute: str) -> Tensor | None:
    return _of(module, getattr(module, attribute, None))


def _of(module: nn.Module, parameter: Tensor | None) -> Tensor | None:
    own: Tensor | None = getattr(parameter, "SCB", None)
    return own if own is not None else getattr(getattr(module, "state", None), "SCB", None)
