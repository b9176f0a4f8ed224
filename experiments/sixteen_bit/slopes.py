"""What 16-bit weights do to slopes, by how evaluations displace the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from zofo_optim import HybridZOFO, hybrid_param_groups

from .options import Slopes
from .rounding import DTYPES
from .runs import load_problem

WAYS: dict[str, dict[str, Any]] = {
    "full, in place": {},
    "full, streamed": dict(perturbation="streamed"),
    "rank 1, in place": dict(structure="low_rank"),
    "rank 1, closed form": dict(structure="low_rank", perturbation="streamed"),
}
Progress = Callable[[Iterable[int], str], Iterable[int]]


def slopes(options: Slopes, progress: Progress) -> dict[str, Any]:
    """Slopes of the loss of one batch, in 16 bits and in fp32 at the same weights, along the same
    directions.

    `share` is <s, t> / <t, t> for slopes s in 16 bits and t in fp32: 1 where they are without
    bias. `error` is its standard error over directions, `noise` the deviation of s - share t over
    that of t. Weights are rounded to the 16-bit dtype first, in fp32 too.
    """
    problem = load_problem(options)
    batch = problem.train.batch(list(range(options.batch_size)))
    result: dict[str, Any] = {"problem": problem.name}
    for name in ("bf16", "fp16"):
        narrow = copy.deepcopy(problem.base).to(DTYPES[name]).requires_grad_(False).eval()
        wide = copy.deepcopy(narrow).float()
        for way, chosen in WAYS.items():
            optimizers = [
                HybridZOFO(
                    hybrid_param_groups(model, zo=dict(lr=0.0, mu=options.mu), verbose=False),
                    distribution=options.distribution,
                    **(chosen if model is narrow else {**chosen, "perturbation": "streamed"}),
                )
                for model in (narrow, wide)
            ]
            found: list[list[float]] = [[], []]
            for seed in progress(range(options.repeats), f"{name}, {way}"):
                for optimizer, model, values in zip(optimizers, (narrow, wide), found, strict=True):
                    optimizer.param_groups[0]["seed"] = options.seed + seed
                    optimizer.zero_grad()
                    optimizer.backward(partial(problem.loss, model, batch))
                    assert optimizer.projected_grads is not None
                    values.append(float(optimizer.projected_grads))
            result[f"{name}, {way}"] = _compared(*map(torch.tensor, found))
    return result


def _compared(ours: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    ours, right = ours.double(), right.double()
    share = float((ours * right).sum() / right.square().sum())
    rest = ours - share * right
    size = float(right.square().mean().sqrt())
    noise = float(rest.square().mean().sqrt()) / size
    error = noise / math.sqrt(len(ours) - 1)  # of a regression through 0
    return {"share": share, "error": error, "noise": noise, "size": size}
