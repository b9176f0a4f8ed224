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
    """one pass over 50,000,000 weights, beside MeZO's recipe and torch's copy_ and add_"""
    elements, pieces = (100_003, 10) if context.quick else (50_000_000, 100)
    for dtype in DTYPES:
        for operation in ("perturb", "recover_perturb", "restore_update"):
            yield _case(operation, dtype, [elements], context.device)
    # the same in smaller tensors, which the allocator recycles: kinder to MeZO's temporaries
    for operation in ("perturb", "recover_perturb", "restore_update"):
        yield _case(operation, torch.float32, [elements // pieces] * pieces, context.device)


def _case(operation: str, dtype: torch.dtype, sizes: list[int], device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def weights() -> list[Tensor]:
        made = [torch.randn(size, generator=generator, device=device) for size in sizes]
        return [t.mul_(0.02).to(dtype) for t in made]

    ours, theirs, other, z = weights(), weights(), weights(), weights()
    shown = str(dtype).removeprefix("torch.")
    name = f"{operation} {shown}" + (f", {len(sizes)} tensors" if len(sizes) > 1 else "")
    passes = {f"zofo {d}": operations(d, device)[operation] for d in DISTRIBUTIONS}

    def torch_in_place() -> None:
        for target, buffer in zip(other, z, strict=True):
            target.add_(buffer.normal_(), alpha=MU)

    def copy() -> None:
        for target, source in zip(other, z, strict=True):
            target.copy_(source)

    def add() -> None:
        for target in other:
            target.add_(MU)

    variants: dict[str, Callable[[], object]] = {
        n: partial(run, ours) for n, (run, _) in passes.items()
    }
    variants |= mezo_passes(theirs)[operation]
    if operation == "perturb":
        variants["torch in place"] = torch_in_place
    variants |= {"copy_": copy, "add_": add}

    elements = sum(sizes)
    return Case(
        name=name,
        sizes={"elements": elements, "tensors": len(sizes), "dtype": shown},
        variants=variants,
        check=lambda: check_passes(name, passes, ours),
        comparisons=_comparisons(name, variants),
        elements=elements,
        bytes=2 * elements * dtype.itemsize,
        notes={"MeZO noise": "gaussian", "bytes": "each weight read once and written once"},
    )


def check_passes(
    name: str, passes: dict[str, tuple[Operation, float]], tensors: list[Tensor], width: int = 4096
) -> None:
    """Every pass against the reference; with Rademacher noise bit for bit.

    Raises:
        WrongResult: one differs.
    """
    for variant, (run, factor) in passes.items():
        exact = "rademacher" in variant
        check_operation(
            f"{name} {variant}",
            run,
            tensors,
            noise=0.0 if exact else factor,
            ulps=0.0 if exact else 2.0,
            reach=REACH,
            width=width,
            number=8 if len(tensors) == 1 else 3,
        )


def _comparisons(name: str, variants: Container[str]) -> list[Comparison]:
    found = []
    for distribution, least in TARGETS.items():
        ours = f"zofo {distribution}"
        for theirs in ("MeZO", "MeZO update only", "torch in place"):
            if theirs in variants:
                target = least if (name, theirs) == ("perturb float32", "MeZO") else None
                found.append(Comparison(f"{theirs} / this =", theirs, ours, ours, at_least=target))
        found.append(Comparison("add_ / this =", "add_", ours, ours))
    return found
