"""One pass over large weights: perturb, recover and perturb, restore and update."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from zofo_kernels import DISTRIBUTIONS, Direction, Shift, Weights, perturb_, update_

from . import foreach, mezo, plots
from .check import Operation, check_operation, require_displacement
from .registry import Case, Comparison, Context, benchmark, require

MU, LR, COEFFICIENT, DECAY = 1e-3, 1e-4, 3.0, 0.01
REACH = 6 * MU  # no Gaussian value is larger than 6
SEED = 7
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATIONS = ("perturb", "recover_perturb", "restore_update")


class Targets(NamedTuple):
    """Least values by case and distribution: speed-up over MeZO's recipe, share of copying."""

    mezo: dict[tuple[str, str], float]
    copy: dict[tuple[str, str], float]


TARGETS = {
    "cpu": Targets(
        mezo={("perturb float32", "gaussian"): 20.0, ("perturb float32", "rademacher"): 50.0},
        copy={},
    ),
    "cuda": Targets(
        mezo={("perturb bfloat16", d): 10.0 for d in DISTRIBUTIONS},
        copy={("perturb bfloat16", "gaussian"): 0.9, ("perturb bfloat16", "rademacher"): 0.95},
    ),
}


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


def baselines(
    tensors: Sequence[Tensor],
) -> dict[str, dict[str, Callable[[], None]]]:
    """The same work by others; where MeZO restores and updates in two passes, its second too."""

    def update() -> None:
        mezo.update(tensors, COEFFICIENT, LR, SEED, DECAY)

    def restore_and_update() -> None:
        mezo.perturb(tensors, MU, SEED, 1)
        update()

    found: dict[str, dict[str, Callable[[], None]]] = {
        "perturb": {
            "MeZO": lambda: mezo.perturb(tensors, MU, SEED, 1),
            "foreach": lambda: foreach.perturb(tensors, MU, SEED),
        },
        "recover_perturb": {
            "MeZO": lambda: mezo.perturb(tensors, MU, SEED, -2),
            "foreach": lambda: foreach.perturb(tensors, -2 * MU, SEED),
        },
        "restore_update": {
            "MeZO": restore_and_update,
            "MeZO update only": update,
            "foreach": lambda: foreach.restore_and_update(
                tensors, MU, COEFFICIENT, LR, SEED, DECAY
            ),
        },
    }
    if tensors[0].device.type == "cuda":
        stock_triton = require("zofo_bench.stock_triton")
        found["perturb"]["tl.randn4x"] = lambda: stock_triton.perturb(tensors, MU, SEED)
    return found


@benchmark("perturb", plot=plots.rates)
def cases(context: Context) -> Iterator[Case]:
    """one pass over the weights, beside copying them and the same by MeZO's recipe and others"""
    cuda = context.device.type == "cuda"
    if context.quick:
        elements, pieces = 100_003, 10
    else:
        elements, pieces = 1_000_000_000 if cuda else 50_000_000, 100
    for dtype in DTYPES:
        for operation in OPERATIONS:
            yield _case(operation, dtype, [elements], context.device)
    # the same in smaller tensors, which the allocator recycles: kinder to MeZO's temporaries
    for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
        for operation in OPERATIONS:
            yield _case(operation, dtype, [elements // pieces] * pieces, context.device)


def _case(operation: str, dtype: torch.dtype, sizes: list[int], device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def weights() -> list[Tensor]:
        made = (torch.randn(size, generator=generator, device=device) for size in sizes)
        return [t.mul_(0.02).to(dtype) for t in made]

    ours = Weights(weights())  # as the optimizer passes them
    theirs, other, z = weights(), weights(), weights()
    shown = str(dtype).removeprefix("torch.")
    name = f"{operation} {shown}" + (f", {len(sizes)} tensors" if len(sizes) > 1 else "")
    passes = {f"zofo {d}": operations(d, device)[operation] for d in DISTRIBUTIONS}
    others = baselines(theirs)[operation]

    def torch_in_place() -> None:
        for target, buffer in zip(other, z, strict=True):
            target.add_(buffer.normal_(), alpha=MU)

    def copy() -> None:
        for target, source in zip(other, z, strict=True):
            target.copy_(source)

    def add() -> None:
        for target in other:
            target.add_(MU)

    def check() -> None:
        check_passes(name, passes, ours)
        if operation == "perturb":
            for variant, run in others.items():
                require_displacement(f"{name} {variant}", run, theirs, MU)

    variants: dict[str, Callable[[], object]] = {
        n: partial(run, ours) for n, (run, _) in passes.items()
    }
    variants |= others
    if operation == "perturb":
        variants["torch in place"] = torch_in_place
    variants |= {"copy_": copy, "add_": add}

    elements = sum(sizes)
    return Case(
        name=name,
        sizes={"elements": elements, "tensors": len(sizes), "dtype": shown},
        variants=variants,
        check=check,
        comparisons=_comparisons(name, variants, device.type),
        elements=elements,
        bytes=2 * elements * dtype.itemsize,
        notes={
            "noise of the others": "gaussian",
            "bytes": "each weight read once and written once",
            "copy_": "between two buffers as large as the weights: the same bytes",
        },
    )


def check_passes(
    name: str, passes: dict[str, tuple[Operation, float]], weights: Weights, width: int = 4096
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
            weights,
            noise=0.0 if exact else factor,
            ulps=0.0 if exact else 2.0,
            reach=REACH,
            width=width,
            number=8 if len(weights.tensors) == 1 else 3,
        )


def _comparisons(name: str, variants: Container[str], kind: str) -> list[Comparison]:
    found = []
    targets = TARGETS[kind]
    for distribution in DISTRIBUTIONS:
        ours = f"zofo {distribution}"
        least = targets.copy.get((name, distribution))
        fraction = partial(Comparison, bottom=ours, shown_at=ours, percent=True)
        found.append(fraction("of copy bandwidth", "copy_", at_least=least))
        for theirs in ("MeZO", "MeZO update only", "foreach", "tl.randn4x", "torch in place"):
            if theirs in variants:
                least = targets.mezo.get((name, distribution)) if theirs == "MeZO" else None
                found.append(Comparison(f"{theirs} / this =", theirs, ours, ours, at_least=least))
        found.append(Comparison("add_ / this =", "add_", ours, ours))
    return found
