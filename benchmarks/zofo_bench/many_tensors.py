"""One pass over many tensors: what the host spends on each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from . import minilm, plots
from .perturb import DISTRIBUTIONS, check_passes, mezo_passes, operations
from .registry import Case, Comparison, Context, benchmark

SMALL_TENSORS = 290
"""As many as a decoder of 32 layers has."""


@benchmark("many_tensors", plot=plots.times)
def cases(context: Context) -> Iterator[Case]:
    """one pass over a list of tensors, beside MeZO's loop; tiny tensors leave the host's part"""
    model = minilm.classifier(tiny=context.quick)
    shapes = [tuple(p.shape) for p in model.parameters()]
    lists: dict[str, list[tuple[int, ...]]] = {
        "MiniLM": shapes,
        "as many, 16 elements each": [(16,)] * len(shapes),
        f"{SMALL_TENSORS} of 16 to 1,024 elements": [(16 << i % 7,) for i in range(SMALL_TENSORS)],
    }
    for name, chosen in lists.items():
        for operation in ("perturb", "recover_perturb", "restore_update"):
            yield _case(f"{operation}, {name}", operation, chosen, context.device)


def _case(name: str, operation: str, shapes: list[tuple[int, ...]], device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)

    def weights() -> list[Tensor]:
        return [(torch.randn(s, generator=generator) * 0.02).to(device) for s in shapes]

    ours, theirs = weights(), weights()
    indices = list(range(len(ours)))  # as the optimizer passes them
    passes = {f"zofo {d}": operations(d, device)[operation] for d in DISTRIBUTIONS}
    return Case(
        name=name,
        sizes={"elements": sum(t.numel() for t in ours), "tensors": len(ours), "dtype": "float32"},
        variants={n: partial(run, ours, indices=indices) for n, (run, _) in passes.items()}
        | {"MeZO": mezo_passes(theirs)[operation]["MeZO"]},
        check=lambda: check_passes(name, passes, ours, width=256),
        comparisons=[Comparison("MeZO / this =", "MeZO", n, n) for n in passes],
        notes={"MeZO noise": "gaussian"},
    )
