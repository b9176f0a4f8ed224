"""A whole optimizer step of a causal language model: its time, and its peak memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from . import plots
from .decoders import (
    LLAMA_7B,
    LORA_TARGETS,
    OPT_1_3B,
    SMALL,
    TINY,
    Decoder,
    build,
    loss_closure,
    random_tokens,
)
from .lora import with_lora
from .measure import free_memory
from .registry import Case, Context, benchmark
from .training_step import WITH_ADAPTER, ZERO_ORDER, Task, inference_bytes, step_cases

OVERHEAD_TARGETS = {("cuda", OPT_1_3B.name): 0.08}
MEMORY_TARGET = 0.01


@benchmark("causal_lm", plot=plots.steps)
def cases(context: Context) -> Iterator[Case]:
    """a whole step of a language model, beside its evaluations alone (overhead) and MeZO's"""
    for decoder, dtype, rows, tokens in _models(context):
        yield from _model(decoder, dtype, rows, tokens, context.device)
        free_memory(context.device)


def _models(context: Context) -> list[tuple[Decoder, torch.dtype, int, int]]:
    both = (torch.float32, torch.bfloat16)
    if context.quick:
        return [(TINY, dtype, 2, 8) for dtype in both]
    if context.device.type == "cpu":
        return [(SMALL, dtype, 4, 64) for dtype in both]
    return [(decoder, torch.bfloat16, 16, 128) for decoder in (OPT_1_3B, LLAMA_7B)]


def _model(
    decoder: Decoder, dtype: torch.dtype, rows: int, tokens: int, device: torch.device
) -> Iterator[Case]:
    model = build(decoder, device, dtype)
    ids = random_tokens(model, rows, tokens, device)
    for modes in (ZERO_ORDER, WITH_ADAPTER):
        if modes is WITH_ADAPTER:
            model = with_lora(model, "CAUSAL_LM", LORA_TARGETS)
        loss = partial(loss_closure, ids=ids)
        task = Task(
            name=f"{decoder.name} {str(dtype).removeprefix('torch.')}",
            model=model,
            loss=loss,
            sizes={"model": decoder.name, "rows": rows, "tokens": tokens},
            inference_bytes=inference_bytes(loss(model), device),
            overhead_target=OVERHEAD_TARGETS.get((device.type, decoder.name)),
            memory_target=MEMORY_TARGET,
        )
        yield from step_cases(task, modes)
        del task
