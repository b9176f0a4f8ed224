"""What a step costs beside its evaluations, by number of parameters and of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from zofo_kernels import Direction, noise
from zofo_optim import HybridZOFO

from . import mezo, plots
from .check import require_close, windows
from .registry import Case, Comparison, Context, WrongResult, benchmark

LR, MU = 1e-6, 1e-3
ESTIMATORS = {"zofo two-sided": "two_sided", "zofo one-sided": "one_sided"}


@benchmark("growth", plot=plots.growth)
def cases(context: Context) -> Iterator[Case]:
    """a zeroth-order step on a loss that costs nothing: what is left is the step's own work"""
    if context.quick:
        parameters, tensors, total = [1_000, 10_000], [1, 10], 2_000
    else:
        parameters = [100_000, 1_000_000, 10_000_000, 100_000_000]
        tensors, total = [1, 10, 100, 1_000], 1_000_000
    for count in parameters:
        yield _case(f"{count:,} parameters", "parameters", count, 1, context.device)
    for count in tensors:
        name = f"{count:,} tensor{'s' if count > 1 else ''} of {total // count:,}"
        yield _case(name, "tensors", total, count, context.device)


def _weights(elements: int, tensors: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    size = elements // tensors
    return [
        torch.randn(size, generator=generator, device=device).mul_(0.02) for _ in range(tensors)
    ]


def _loss(parameters: list[Tensor]) -> Callable[[], Tensor]:
    """The first element: its gradient is known, and taking it costs nothing."""

    def closure() -> Tensor:
        return parameters[0].view(-1)[0].clone()

    return closure


def _case(name: str, axis: str, elements: int, tensors: int, device: torch.device) -> Case:
    ours = _weights(elements, tensors, device)
    theirs = _weights(elements, tensors, device)
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
        for shown, estimator in ESTIMATORS.items()
    }
    variants: dict[str, Callable[[], object]] = {
        shown: (lambda optimizer=optimizer: optimizer.step(closure))  # type: ignore[misc]
        for shown, optimizer in optimizers.items()
    }
    variants["MeZO"] = mezo.MeZO(theirs, _loss(theirs), lr=LR, eps=MU).step
    variants["bare"] = lambda: (closure(), closure())

    def check() -> None:
        for shown, optimizer in optimizers.items():
            _check_step(f"{name} {shown}", optimizer, ours)

    return Case(
        name=name,
        sizes={
            "axis": axis,
            "elements": elements // tensors * tensors,
            "tensors": tensors,
            "dtype": "float32",
        },
        variants=variants,
        check=check,
        comparisons=[Comparison("MeZO / this =", "MeZO", "zofo two-sided", "zofo two-sided")],
        notes={"bare": "the two evaluations alone"},
    )


def _check_step(what: str, optimizer: HybridZOFO, parameters: list[Tensor]) -> None:
    """f(w) = w_0, so the projected gradient is z_0 and w <- w - lr z_0 z."""
    pieces = [(i, a, b) for i, p in enumerate(parameters) for a, b in windows(p.numel(), 256, 4)]
    before = torch.cat([parameters[i][a:b].clone() for i, a, b in pieces])
    seed, step = optimizer.param_groups[0]["seed"], optimizer.param_groups[0]["zo_step"]
    direction = Direction(seed, step)
    z = torch.cat(
        [
            noise((b - a,), direction, index=i, offset=a, device=before.device, backend="reference")
            for i, a, b in pieces
        ]
    )
    optimizer.step(_loss(parameters))
    found = optimizer.projected_grads
    assert found is not None
    if not abs(float(found) - float(z[0])) <= 1e-3:
        raise WrongResult(f"{what}: projected gradient {float(found):.5g}, should be {z[0]:.5g}")
    got = torch.cat([parameters[i][a:b] for i, a, b in pieces])
    expected = before - LR * float(found) * z
    factor = LR * abs(float(found))
    require_close(what, before, got, expected, noise=factor, ulps=4, reach=6 * MU)
