"""What a step costs beside its evaluations, by number of parameters and of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from zofo_optim import HybridZOFO

from . import mezo, plots
from .check_step import check_step
from .registry import Case, Comparison, Context, benchmark

LR, MU = 1e-6, 1e-3
ESTIMATORS = {
    "zofo two-sided": ("two_sided", (1, -1)),
    "zofo one-sided": ("one_sided", (0, 1)),
}
"""By variant; with the multiples of mu z at which the loss is taken."""


@benchmark("growth", plot=plots.growth)
def cases(context: Context) -> Iterator[Case]:
    """a zeroth-order step on a loss that costs nothing: what is left is the step's own work"""
    cuda = context.device.type == "cuda"
    if context.quick:
        parameters, tensors, total = [1_000, 10_000], [1, 10], 2_000
    else:
        parameters = [10**power for power in (range(6, 10) if cuda else range(5, 9))]
        tensors, total = [1, 10, 100, 1_000, 3_000], 10_000_000 if cuda else 1_000_000
    dtype = torch.bfloat16 if cuda else torch.float32
    for count in parameters:
        yield _case(f"{count:,} parameters", "parameters", count, 1, dtype, context.device)
    for count in tensors:
        name = f"{count:,} tensor{'s' if count > 1 else ''} of {total // count:,}"
        yield _case(name, "tensors", total, count, dtype, context.device)


def _weights(elements: int, tensors: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    size = elements // tensors
    made = (torch.randn(size, generator=generator, device=device) for _ in range(tensors))
    return [t.mul_(0.02).to(dtype) for t in made]


def _loss(parameters: list[Tensor]) -> Callable[[], Tensor]:
    """The first element, in fp32: taking it costs nothing."""

    def closure() -> Tensor:
        return parameters[0][0].to(torch.float32, copy=True)

    return closure


def _case(
    name: str, axis: str, elements: int, tensors: int, dtype: torch.dtype, device: torch.device
) -> Case:
    ours = _weights(elements, tensors, dtype, device)
    theirs = _weights(elements, tensors, dtype, device)
    closure = _loss(ours)
    group = {
        "params": ours,
        "param_names": [f"layers.{i}.weight" for i in range(tensors)],
        "mode": "zo",
        "lr": LR,
        "mu": MU,
    }
    optimizers = {
        shown: HybridZOFO([dict(group)], estimator=estimator)
        for shown, (estimator, _) in ESTIMATORS.items()
    }
    variants: dict[str, Callable[[], object]] = {
        shown: (lambda optimizer=optimizer: optimizer.step(closure))  # type: ignore[misc]
        for shown, optimizer in optimizers.items()
    }
    variants["MeZO"] = mezo.MeZO(theirs, _loss(theirs), lr=LR, eps=MU).step
    variants["bare"] = lambda: (closure(), closure())

    def check() -> None:
        for shown, (estimator, signs) in ESTIMATORS.items():
            one = partial(check_step, signs=signs, distribution="gaussian")
            one(f"{name} {estimator}", optimizers[shown], closure)
            one(f"{name} {estimator}, second step", optimizers[shown], closure, first=False)

    return Case(
        name=name,
        sizes={
            "axis": axis,
            "elements": elements // tensors * tensors,
            "tensors": tensors,
            "dtype": str(dtype).removeprefix("torch."),
        },
        variants=variants,
        check=check,
        comparisons=[Comparison("MeZO / this =", "MeZO", "zofo two-sided", "zofo two-sided")],
        notes={"bare": "the two evaluations alone"},
    )
