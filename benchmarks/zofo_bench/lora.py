"""The adapter of the benchmarks' models."""

from __future__ import annotations

import warnings

from torch import nn

from .registry import require

RANK = 8


def with_lora(model: nn.Module, task: str, targets: list[str]) -> nn.Module:
    """LoRA of rank 8 on the targets (and a new head, if the task has one); the base is frozen.

    Raises:
        Unavailable: peft is not installed.
    """
    peft = require("peft")
    config = peft.LoraConfig(
        task_type=task, r=RANK, lora_alpha=2 * RANK, target_modules=list(targets)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a renamed attribute
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted
