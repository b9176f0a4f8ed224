"""Smoothness along a run of SGD: what Figure 1 and the scatter plot are made of.

As in App. D.4 of Ma, Yu, Huang 2026, all that the run trains, base and adapter, follows gradients
of batches of 8 at one rate, and what is measured at a point of the run is the Hessian of the loss
of the batch that is to be trained on there.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from zofo_optim.smoothness import measure_smoothness
from zofo_optim.whole import write_json

from ..classification import Batch
from ..finetune import model_name
from ..heads import last_linear
from ..methods import METHODS, AdapterOptions, prepare
from ..models import Problem
from ..partition.problems import Sizes, batches, load
from ..tasks import default_source
from ..training import RunError
from .options import TheoryOptions
from .studies import Study

NEXT, SAME = "next", "same"
"""The batch that is trained on at the point; one batch throughout, which the run does not train."""
APART = 1000
"""Added to the seed of the order of batches, for the batch that stays the same."""
Blocks = dict[str, list[Tensor]]
Row = dict[str, Any]


def problem_of(options: TheoryOptions, model: str, study: Study) -> Problem:
    """
    Raises:
        DataError: the data is not there.
        ModelError: the model cannot be loaded.
    """
    data = options.data or str(default_source(study.task))
    sizes = Sizes(options.train_size, options.dev_size, options.dev_size)
    return load(model, study.task, data, sizes)


def blocks_of(problem: Problem, method: str, seed: int) -> tuple[nn.Module, Blocks]:
    """A model of a method, whose base trains too, and its parameters: "model", or "base",
    "adapter" and an encoder's "head"."""
    torch.manual_seed(seed)
    model, groups = prepare(
        METHODS[method], problem, AdapterOptions(), zo={"lr": 0.0}, fo={"lr": 0.0}, include=()
    )
    head = None if problem.causal else last_linear(problem.base)[0].split(".")[0]
    blocks: Blocks = {}
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            block = "base" if group["mode"] == "zo" else "adapter"
            if METHODS[method].adapter is None:
                block = "model"
            elif block == "adapter" and head is not None and head in name.split("."):
                block = "head"
            blocks.setdefault(block, []).append(parameter.requires_grad_(True))
    return model.train(), blocks


def closure_of(problem: Problem, model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """The mean loss of the batch."""
    return lambda: problem.train.losses(model, batch).mean()


def places(length: int, points: int) -> list[int]:
    """Steps, from 0 to the last one, closer at first, where most happens."""
    ends = max(points - 1, 1)
    return sorted({round(length * (i / ends) ** 2) for i in range(points)})


@dataclass(frozen=True)
class Plan:
    """What decides the numbers of a run, beside the versions of the packages.

    Attributes:
        blocks: measured ones; those that the model lacks are left out.
        batches: of :data:`NEXT`, :data:`SAME`.
    """

    model: str
    study: Study
    method: str
    seed: int
    length: int
    points: int
    vectors: int
    batch_size: int
    train_size: int
    blocks: tuple[str, ...]
    batches: tuple[str, ...] = (NEXT,)

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON gives them back."""
        own = {**vars(self), "study": None, "task": self.study.task, "rate": self.study.rate}
        found: dict[str, Any] = json.loads(json.dumps({**own, "model": model_name(self.model)}))
        return found


def planned(
    options: TheoryOptions,
    model: str,
    study: Study,
    method: str,
    seed: int,
    *,
    points: int,
    vectors: int,
    **more: Any,
) -> Plan:
    """What the command line says of steps, points and vectors comes before what is given here."""
    return Plan(
        *(model, study, method, seed),
        length=options.steps or study.length,
        points=options.points or points,
        vectors=options.vectors or vectors,
        batch_size=options.batch_size,
        train_size=options.train_size,
        **more,
    )


def rows_of(
    plan: Plan, file: Path, load_problem: Callable[[], Problem], console: Console
) -> list[Row]:
    """A row a point, batch and block; from the file, or made and written there.

    An eigenvalue that was not found is None: see :func:`_point`.

    Raises:
        RunError: the file holds a run with other settings.
    """
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["settings"] != plan.settings:
            raise RunError(f"{file} holds a run with other settings: take another --out")
        rows: list[Row] = found["rows"]
        return rows
    rows = []
    for row in _measured(plan, load_problem()):
        rows.append(row)
        largest = "not found" if row["largest"] is None else f"{row['largest']:.3g}"
        console.print(
            f"{model_name(plan.model)}, {plan.study.task}, {plan.method}, seed {plan.seed}: step "
            f"{row['step']}/{plan.length}, {row['batch']} batch, {row['block']}: loss "
            f"{row['loss']:.3f}, gradient {row['gradient_norm']:.3g}, norm {row['frobenius']:.3g}, "
            f"largest {largest}",
            highlight=False,
            soft_wrap=True,
        )
    write_json(file, {"settings": plan.settings, "rows": rows})
    return rows


def _measured(plan: Plan, problem: Problem) -> Iterator[Row]:
    model, blocks = blocks_of(problem, plan.method, plan.seed)
    optimizer = torch.optim.SGD([p for block in blocks.values() for p in block], lr=plan.study.rate)
    same = next(batches(problem, plan.batch_size, plan.seed + APART))
    wanted = {name: blocks[name] for name in plan.blocks if name in blocks}
    measured = places(plan.length, plan.points)
    for step, batch in enumerate(batches(problem, plan.batch_size, plan.seed)):
        for kind in plan.batches if step in measured else ():
            taken = batch if kind == NEXT else same
            yield from _point(plan, wanted, closure_of(problem, model, taken), step, kind)
        if step == plan.length:
            return
        optimizer.zero_grad()
        loss = closure_of(problem, model, batch)()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _point(
    plan: Plan, blocks: Blocks, closure: Callable[[], Tensor], step: int, kind: str
) -> Iterator[Row]:
    """By differences of gradients; where those show no eigenvalue, it is of double backward."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the largest eigenvalue", UserWarning)
        found = measure_smoothness(blocks, closure, directions=plan.vectors, seed=step)
    left = {name: blocks[name] for name in blocks if found[name].largest is None}
    exact = measure_smoothness(left, closure, method="exact", directions=2) if left else {}
    for name, block in found.items():
        yield {
            **{"step": step, "batch": kind, "block": name, "loss": found.loss},
            **{**vars(block), "largest": exact.get(name, block).largest},
        }
