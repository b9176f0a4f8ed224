"""One pass over many tensors: what the host spends, and how much it starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from zofo_kernels import DISTRIBUTIONS, Weights

from . import minilm, plots
from .check import require_displacement
from .decoders import LLAMA_7B, OPT_1_3B, TINY, shapes
from .perturb import MU, OPERATIONS, baselines, check_passes, operations
from .registry import Case, Comparison, Context, benchmark

Shapes = Sequence[tuple[int, ...]]
SMALLER = 1000


@benchmark("many_tensors", plot=plots.passes, counts=True)
def cases(context: Context) -> Iterator[Case]:
    """one pass over a list of tensors, beside others; tiny ones leave the host's part"""
    model = minilm.classifier(tiny=context.quick)
    minilm_shapes = [tuple(p.shape) for p in model.parameters()]
    decoder = TINY if context.quick else LLAMA_7B
    smaller = [(max(1, math.prod(s) // SMALLER),) for s in shapes(decoder)]
    lists: list[tuple[str, Shapes, torch.dtype]] = [
        ("MiniLM", minilm_shapes, torch.float32),
        ("as many, 16 elements each", [(16,)] * len(minilm_shapes), torch.float32),
        (f"{decoder.name} / {SMALLER:,}", smaller, torch.float32),
    ]
    if context.device.type == "cuda" and not context.quick:
        lists.append(("OPT-1.3B", shapes(OPT_1_3B), torch.bfloat16))
    for name, chosen, dtype in lists:
        for operation in OPERATIONS:
            yield _case(f"{operation}, {name}", operation, chosen, dtype, context.device)


def _case(
    name: str, operation: str, chosen: Shapes, dtype: torch.dtype, device: torch.device
) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def weights() -> list[Tensor]:
        made = (torch.randn(s, generator=generator, device=device) for s in chosen)
        return [t.mul_(0.02).to(dtype) for t in made]

    ours, theirs = Weights(weights()), weights()  # ours as the optimizer passes them
    passes = {f"zofo {d}": operations(d, device)[operation] for d in DISTRIBUTIONS}
    others = baselines(theirs)[operation]

    def check() -> None:
        check_passes(name, passes, ours, width=256)
        if operation == "perturb":
            for variant, run in others.items():
                require_displacement(f"{name} {variant}", run, theirs, MU)

    variants: dict[str, Callable[[], object]] = {
        n: partial(run, ours) for n, (run, _) in passes.items()
    }
    return Case(
        name=name,
        sizes={
            "elements": sum(t.numel() for t in theirs),
            "tensors": len(theirs),
            "dtype": str(dtype).removeprefix("torch."),
        },
        variants=variants | others,
        check=check,
        comparisons=[
            Comparison(f"{top} / this{shown} =", top, n, n, of=of)
            for n in passes
            for top in ("MeZO", "foreach")
            for of, shown in (("seconds", ""), ("host_seconds", ", until it returns"))
        ],
        notes={"noise of the others": "gaussian"},
        host=True,
    )
