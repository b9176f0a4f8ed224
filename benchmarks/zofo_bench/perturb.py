"""One pass over one large tensor: perturb, recover and perturb, restore and update."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from zofo_kernels import Direction, Shift, perturb_, update_

from . import mezo, plots
from .check import Operation, check_operation
from .registry import Case, Comparison, Context, benchmark

MU, LR, COEFFICIENT, DECAY = 1e-3, 1e-4, 3.0, 0.01
REACH = 6 * MU  # no Gaussian value is larger than 6
SEED = 7
DISTRIBUTIONS = ("gaussian", "rademacher")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = {"gaussian": 20.0, "rademacher": 50.0}
"""Least speed-up over MeZO's recipe, of perturb on float32."""


def operations(distribution: str, device: torch.device) -> dict[str, tuple[Operation, float]]:
    """The three passes of a two-sided step, and the largest factor of the noise in each."""
    direction = Direction(SEED, 0, 0, distribution)
    update = partial(
        update_,
        directions=[direction],
        coefficients=torch.tensor([COEFFICIENT], device=device),
        lr=LR,
        weight_decay=DECAY,
        recover=Shift(direction, -MU),
    )
    move = partial(perturb_, direction=direction, scale=-MU, recover=Shift(direction, MU))
    return {
        "perturb": (partial(perturb_, direction=direction, scale=MU), MU),
        "recover_perturb": (move, 2 * MU),
        "restore_update": (update, MU + LR * COEFFICIENT),
    }


def mezo_passes(tensors: Sequence[Tensor]) -> dict[str, dict[str, Callable[[], None]]]:
    """What MeZO does for the same work; restore and update are two passes there."""

    def update() -> None:
        mezo.update(tensors, COEFFICIENT, LR, SEED, DECAY)

    def restore_and_update() -> None:
        mezo.perturb(tensors, MU, SEED, 1)
        update()

    return {
        "perturb": {"MeZO": lambda: mezo.perturb(tensors, MU, SEED, 1)},
        "recover_perturb": {"MeZO": lambda: mezo.perturb(tensors, MU, SEED, -2)},
        "restore_update": {"MeZO": restore_and_update, "MeZO update only": update},
    }


@benchmark("perturb", plot=plots.rates)
def cases(context: Context) -> Iterator[Case]:
    """one pass over one large tensor, beside MeZO's recipe and torch's copy_ and add_"""
    elements = 100_003 if context.quick else 50_000_000
    for dtype in DTYPES:
        for operation in ("perturb", "recover_perturb", "restore_update"):
            yield _case(operation, dtype, elements, context.device)


def _case(operation: str, dtype: torch.dtype, elements: int, device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def weights() -> Tensor:
        made = torch.randn(elements, generator=generator, device=device, dtype=torch.float32)
        return made.mul_(0.02).to(dtype)

    ours, theirs, other = weights(), weights(), weights()
    name = f"{operation} {str(dtype).removeprefix('torch.')}"
    passes = {d: operations(d, device)[operation] for d in DISTRIBUTIONS}
    variants: dict[str, Callable[[], object]] = {
        distribution: partial(run, [ours]) for distribution, (run, _) in passes.items()
    }
    variants |= mezo_passes([theirs])[operation]
    if operation == "perturb":
        z = torch.empty_like(other)
        variants["torch in place"] = lambda: other.add_(z.normal_(), alpha=MU)
    variants["copy_"] = lambda: other.copy_(theirs)
    variants["add_"] = lambda: other.add_(MU)

    def check() -> None:
        for distribution, (run, factor) in passes.items():
            exact = distribution == "rademacher"
            check_operation(
                f"{name} {distribution}",
                run,
                [ours],
                noise=0.0 if exact else factor,
                ulps=0.0 if exact else 2.0,
                reach=REACH,
            )

    return Case(
        name=name,
        sizes={"elements": elements, "tensors": 1, "dtype": str(dtype).removeprefix("torch.")},
        variants=variants,
        check=check,
        comparisons=_comparisons(operation, dtype, variants),
        elements=elements,
        bytes=2 * elements * dtype.itemsize,
        notes={"MeZO noise": "gaussian", "bytes": "each weight read once and written once"},
    )


def _comparisons(operation: str, dtype: torch.dtype, variants: Container[str]) -> list[Comparison]:
    found = []
    for ours in DISTRIBUTIONS:
        for theirs in ("MeZO", "MeZO update only", "torch in place"):
            if theirs in variants:
                targeted = (operation, dtype, theirs) == ("perturb", torch.float32, "MeZO")
                target = TARGETS[ours] if targeted else None
                found.append(Comparison(f"{theirs} / this =", theirs, ours, ours, at_least=target))
        found.append(Comparison("add_ / this =", "add_", ours, ours))
    return found
