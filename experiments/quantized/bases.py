"""The base models: in 16 bits, and quantised by their formats' own libraries, on the CPU."""

from __future__ import annotations

import copy
import dataclasses
import logging
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..models import ModelError, Problem

BF16, INT8, INT4, BNB_INT8, BNB_NF4 = (
    "bf16",
    "int8 (torchao)",
    "int4 (torchao)",
    "int8 (bitsandbytes)",
    "nf4 (bitsandbytes)",
)
FORMATS = (BF16, INT8, INT4, BNB_NF4, BNB_INT8)
QUANTISED = FORMATS[1:]
GROUP = 32
"""Weights that share an int4 scale; a row that this does not divide has one scale."""
DENSE = ("lm_head", "classifier")
"""Linear layers that stay as they are, as transformers leaves them by default."""


def with_base(problem: Problem, format: str) -> Problem:
    """The problem with its model in a format; the other weights stay in fp32.

    Raises:
        ModelError: the format's library is missing.
    """
    made: Callable[[Any], Any] = {
        BF16: lambda base: copy.deepcopy(base).to(torch.bfloat16),
        INT8: lambda base: _by_torchao(base, bits=8),
        INT4: lambda base: _by_torchao(base, bits=4),
        BNB_INT8: lambda base: _by_bitsandbytes(base, load_in_8bit=True),
        BNB_NF4: lambda base: _by_bitsandbytes(base, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }[format]
    try:
        return dataclasses.replace(problem, base=made(problem.base))
    except ImportError as error:
        raise ModelError(
            f"{format} needs the extra 'quantized' of this package: {error}"
        ) from error


def _by_torchao(base: nn.Module, bits: int) -> nn.Module:
    from torchao.quantization import (
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        quantize_,
    )

    model = copy.deepcopy(base)

    def rows(module: nn.Module, name: str, divisible: bool) -> bool:
        if not isinstance(module, nn.Linear) or name.split(".")[-1] in DENSE:
            return False
        return (module.in_features % GROUP == 0) == divisible

    if bits == 8:
        config = Int8WeightOnlyConfig()
        quantize_(model, config, lambda m, name: rows(m, name, True) or rows(m, name, False))
        return model
    for divisible, granularity in ((True, PerGroup(GROUP)), (False, PerAxis(0))):
        config = IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=granularity,
        )
        quantize_(model, config, lambda m, name, own=divisible: rows(m, name, own))
    return model


def _by_bitsandbytes(base: Any, **options: Any) -> nn.Module:
    """As users load such models."""
    from transformers import BitsAndBytesConfig

    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)  # each layer warns of its casts
    if "load_in_4bit" in options:
        options["bnb_4bit_compute_dtype"] = torch.float32
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        model: nn.Module = type(base).from_pretrained(
            folder,
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(**options),  # type: ignore[no-untyped-call]
            device_map="cpu",
        )
    for module in model.modules():  # a layout of the CPU's own, which fits few shapes
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # for mypy
    return model
