"""Cases of a whole optimizer step, beside the bare evaluations that it contains."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zofo_optim import HybridZOFO, hybrid_param_groups

from . import mezo
from .check_step import Closure, check_step
from .measure import free_memory, peak_bytes
from .registry import Case, Comparison, WrongResult

LR_ZO, LR_FO, MU = 1e-6, 1e-3, 1e-3
FO_TOLERANCE = 0.1
"""Of a first-order update on CUDA, where some backward kernels add in any order."""


@dataclass(frozen=True)
class Mode:
    """What a step does, and its evaluations without gradients."""

    name: str
    adapter: bool
    zeroth_order: bool
    estimator: str = "two_sided"

    @property
    def signs(self) -> tuple[int, ...]:
        """Multiples of mu z at which the loss is taken without gradients; 0 is the clean one."""
        if not self.zeroth_order:
            return ()
        if self.estimator == "two_sided":
            return (1, -1)
        return (1,) if self.adapter else (0, 1)


ZERO_ORDER = (
    Mode("ZO, one-sided", False, True, "one_sided"),
    Mode("ZO, two-sided", False, True, "two_sided"),
)
WITH_ADAPTER = (
    Mode("FO-LoRA", True, False),
    Mode("hybrid, one-sided", True, True, "one_sided"),
    Mode("hybrid, two-sided", True, True, "two_sided"),
)


@dataclass(frozen=True)
class Task:
    """A model, in the mode that it is to be measured in, and its loss on a batch.

    Args:
        name: added to the mode's name.
        model: frozen but for the adapter, if it has one.
        loss: makes the closure of a model like this one.
        sizes: of the batch, for the record.
        inference_bytes: peak memory of an evaluation without gradients, before any optimizer.
        overhead_target: most that a step of ours may cost over its evaluations, if set.
        memory_target: most that the peak of ZO-only steps may be, over ``inference_bytes``.
    """

    name: str
    model: nn.Module
    loss: Callable[[nn.Module], Closure]
    sizes: dict[str, Any] = field(default_factory=dict)
    inference_bytes: int | None = None
    overhead_target: float | None = None
    memory_target: float | None = None

    @functools.cached_property
    def closure(self) -> Closure:
        return self.loss(self.model)

    @property
    def weight(self) -> Tensor:
        """The first base weight, which tells device and dtype."""
        return next(self.model.parameters())

    def groups(self) -> list[dict[str, Any]]:
        zo, fo = {"lr": LR_ZO, "mu": MU}, {"lr": LR_FO}
        found: list[dict[str, Any]] = hybrid_param_groups(self.model, zo, fo, verbose=False)
        return found

    def parameters(self, mode: str) -> list[Tensor]:
        return [p for group in self.groups() if group["mode"] == mode for p in group["params"]]


class Ours:
    """The step under test."""

    def __init__(self, task: Task, mode: Mode, distribution: str) -> None:
        self.task, self.mode, self.distribution = task, mode, distribution
        self.optimizer = HybridZOFO(
            [g for g in task.groups() if g["mode"] == "fo" or mode.zeroth_order],
            estimator=mode.estimator,
            distribution=distribution,
            fo_optimizer=torch.optim.AdamW,
        )

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.optimizer.step(self.task.closure)


class Bare:
    """The same evaluations in a plain loop, with the same first-order step; nothing else."""

    def __init__(self, task: Task, mode: Mode) -> None:
        self.task, self.mode = task, mode
        trained = task.parameters("fo")
        self.optimizer = (
            torch.optim.AdamW(trained, lr=LR_FO, weight_decay=0) if mode.adapter else None
        )

    def step(self) -> None:
        closure = self.task.closure
        if self.optimizer is not None:
            self.optimizer.zero_grad()
            closure().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for _ in self.mode.signs:
                closure()
        if self.optimizer is not None:
            self.optimizer.step()


def _published(task: Task, *, own_copy: bool) -> mezo.MeZO:
    """MeZO's step; it moves the weights to new memory, so that timing gives it its own."""
    model = copy.deepcopy(task.model) if own_copy else task.model
    return mezo.MeZO(list(model.parameters()), task.loss(model), lr=LR_ZO, eps=MU)


def inference_bytes(closure: Closure, device: torch.device) -> int | None:
    """Peak memory of an evaluation without gradients."""
    with torch.no_grad():
        return peak_bytes(closure, device)


def step_cases(task: Task, modes: Sequence[Mode]) -> Iterator[Case]:
    """A case for each mode; ours and the bare loop share the model, which steps hardly change."""
    for mode in modes:
        yield _case(task, mode)


def _case(task: Task, mode: Mode) -> Case:
    name = f"{mode.name}, {task.name}"
    distributions = ("gaussian", "rademacher") if mode.zeroth_order else ("gaussian",)
    ours = {f"zofo {d}" if mode.zeroth_order else "zofo": d for d in distributions}
    makers: dict[str, Callable[..., Any]] = {
        n: functools.partial(Ours, task, mode, d) for n, d in ours.items()
    }
    makers["bare"] = functools.partial(Bare, task, mode)
    variants = {n: _lazily(make) for n, make in makers.items()}
    with_mezo = not mode.adapter and mode.estimator == "two_sided"
    if with_mezo:
        makers["MeZO"] = functools.partial(_published, task, own_copy=False)
        variants["MeZO"] = _lazily(functools.partial(_published, task, own_copy=True))
    device = task.weight.device

    def check() -> None:
        for n, distribution in ours.items():
            _check(f"{name} {n}", task, mode, distribution)

    def peaks() -> dict[str, int | None]:
        found = {"inference": task.inference_bytes}
        for n, make in makers.items():
            found[n] = peak_bytes(make().step, device)
            task.model.zero_grad()
            free_memory(device)
        return found

    zeroth = task.parameters("zo") if mode.zeroth_order else []
    return Case(
        name=name,
        sizes={
            **task.sizes,
            "zo_parameters": sum(p.numel() for p in zeroth),
            "zo_tensors": len(zeroth),
            "fo_parameters": sum(p.numel() for p in task.parameters("fo")),
            "dtype": str(task.weight.dtype).removeprefix("torch."),
        },
        variants=variants,
        check=check,
        comparisons=list(_comparisons(task, mode, list(ours), with_mezo)),
        notes={
            "forwards_without_gradients": len(mode.signs),
            "forward_backwards": int(mode.adapter),
            "fo_optimizer": "AdamW" if mode.adapter else None,
        },
        peaks=peaks,
    )


def _lazily(make: Callable[[], Any]) -> Callable[[], None]:
    """A step whose job is made by the first call, so that it holds no memory before.

    That call warms up: it is the optimizer's first step, which also verifies the closure.
    """
    job = functools.cache(make)
    return lambda: job().step()


def _comparisons(
    task: Task, mode: Mode, ours: Sequence[str], with_mezo: bool
) -> Iterator[Comparison]:
    published = ["MeZO"] if with_mezo else []
    for n in [*ours, *published]:
        target = task.overhead_target if n in ours else None
        yield Comparison("overhead", n, "bare", n, plus=-1, percent=True, at_most=target)
        if n in ours and with_mezo:
            yield Comparison("MeZO / this =", "MeZO", n, n)
        target = task.memory_target if n in ours and not mode.adapter else None
        over = functools.partial(Comparison, shown_at=n, plus=-1, percent=True, of="peak_bytes")
        yield over("peak memory over inference's", n, "inference", at_most=target)
        if mode.adapter:
            yield over("peak memory over the bare loop's", n, "bare")


def _check(what: str, task: Task, mode: Mode, distribution: str) -> None:
    """One step of ours from where a plain loop started; first-order weights must agree.

    Then a second step, which is like those that are timed.

    Raises:
        WrongResult: they do not, or the zeroth-order part is wrong.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the others may add in any order
        expected, start = _plain_first_order(task, mode)
        ours = Ours(task, mode, distribution)
        torch.manual_seed(11)
        signs = ((0,) if mode.adapter else ()) + mode.signs
        one = functools.partial(check_step, signs=signs, distribution=distribution)
        one(what, ours.optimizer, task.closure)
        _check_first_order(what, task, expected, start)
        task.model.zero_grad()
        one(f"{what}, second step", ours.optimizer, task.closure, first=False)
    task.model.zero_grad()


def _check_first_order(
    what: str, task: Task, expected: Sequence[Tensor], start: Sequence[Tensor]
) -> None:
    for p, right, before in zip(task.parameters("fo"), expected, start, strict=True):
        got = p.detach()
        if torch.equal(got, right):
            continue
        off = float((got.double() - right.double()).norm())
        moved = float((right.double() - before.double()).norm())
        if got.device.type == "cpu" or not off <= FO_TOLERANCE * moved:
            raise WrongResult(f"{what}: first-order weights differ from a plain loop's")


def _plain_first_order(task: Task, mode: Mode) -> tuple[list[Tensor], list[Tensor]]:
    """First-order weights after one step of a plain loop, and before; the step is taken back."""
    trained = [p.detach() for p in task.parameters("fo")]
    start = [p.clone() for p in trained]
    if mode.adapter:
        plain = Bare(task, Mode(mode.name, adapter=True, zeroth_order=False))
        torch.manual_seed(11)
        plain.step()
    after = [p.clone() for p in trained]
    for p, before in zip(trained, start, strict=True):
        p.copy_(before)
    task.model.zero_grad()
    return after, start
