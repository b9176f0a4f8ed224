"""A whole optimizer step of a MiniLM classifier, beside the bare evaluations that it contains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

from . import minilm, plots
from .lora import with_lora
from .registry import Case, Context, benchmark
from .training_step import WITH_ADAPTER, ZERO_ORDER, Task, inference_bytes, step_cases

OVERHEAD_TARGETS = {"cpu": 0.35}


@benchmark("step", plot=plots.steps)
def cases(context: Context) -> Iterator[Case]:
    """a whole MiniLM step on 16 x 32 tokens, beside its evaluations alone (overhead) and MeZO's"""
    device = context.device
    plain = minilm.classifier(tiny=context.quick).to(device)
    adapted = with_lora(copy.deepcopy(plain), "SEQ_CLS", minilm.LORA_TARGETS)
    plain.requires_grad_(False)
    rows, tokens = (2, 8) if context.quick else (16, 32)
    batch = minilm.random_batch(plain, rows, tokens, device)
    loss = partial(minilm.loss_closure, batch=batch)
    for dropout in (True,) if context.quick else (True, False):
        for model, modes in ((plain, ZERO_ORDER), (adapted, WITH_ADAPTER)):
            model.train(dropout)
            task = Task(
                name="dropout" if dropout else "no dropout",
                model=model,
                loss=loss,
                sizes={"rows": rows, "tokens": tokens},
                inference_bytes=inference_bytes(loss(model), device),
                overhead_target=OVERHEAD_TARGETS.get(device.type),
            )
            yield from step_cases(task, modes)
