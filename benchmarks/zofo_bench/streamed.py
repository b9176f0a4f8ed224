"""Steps with streamed perturbation beside steps that perturb in place; cost of a torch call."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zofo_kernels import DISTRIBUTIONS, Direction, Shift, perturb_, perturbed, update_
from zofo_optim import HybridZOFO
from zofo_optim.perturbation.low_rank import Source
from zofo_optim.perturbation.streaming import Streaming
from zofo_optim.watch import ClosureWatch

from . import decoders, minilm, plots
from .check_step import check_step
from .lora import with_lora
from .measure import free_memory, peak_bytes
from .registry import Case, Comparison, Context, WrongResult, benchmark
from .training_step import MU, WITH_ADAPTER, ZERO_ORDER, Bare, Mode, Task, inference_bytes

PERTURBATIONS = ("in_place", "streamed")
CALLS = 1000  # so that milliseconds a sample are microseconds a call
SEED = 7


@benchmark("streamed", plot=plots.steps)
def cases(context: Context) -> Iterator[Case]:
    """two-sided steps, streamed and in place, over bare evaluations; µs of 1000 calls"""
    device, quick = context.device, context.quick
    yield from _steps(_minilm(device, quick), minilm.LORA_TARGETS, "SEQ_CLS", device)
    for decoder, dtype, rows, tokens in _decoders(context):
        model = decoders.build(decoder, device, dtype)
        ids = decoders.random_tokens(model, rows, tokens, device)
        loss = partial(decoders.loss_closure, ids=ids)
        name = f"{decoder.name} {str(dtype).removeprefix('torch.')}"
        task = Task(name, model, loss, {"rows": rows, "tokens": tokens})
        del model
        yield from _steps(task, decoders.LORA_TARGETS, "CAUSAL_LM", device)
        del task
        free_memory(device)
    yield _calls(device)


def _minilm(device: torch.device, quick: bool) -> Task:
    model = minilm.classifier(tiny=quick).to(device).requires_grad_(False)
    rows, tokens = (2, 8) if quick else (16, 32)
    batch = minilm.random_batch(model, rows, tokens, device)
    loss = partial(minilm.loss_closure, batch=batch)
    return Task("MiniLM float32", model, loss, {"rows": rows, "tokens": tokens})


def _decoders(context: Context) -> list[tuple[decoders.Decoder, torch.dtype, int, int]]:
    both = (torch.float32, torch.bfloat16)
    if context.quick:
        return [(decoders.TINY, dtype, 2, 8) for dtype in both]
    small = [(decoders.SMALL, dtype, 4, 64) for dtype in both]
    if context.device.type == "cpu":
        return small
    return [*small, (decoders.OPT_1_3B, torch.bfloat16, 16, 128)]


# ---- steps ------------------------------------------------------------------------------------


def _steps(task: Task, targets: list[str], kind: str, device: torch.device) -> Iterator[Case]:
    """Of the weights alone, then beside an adapter."""
    modes = [mode for mode in (*ZERO_ORDER, *WITH_ADAPTER) if mode.zeroth_order]
    for mode in (mode for mode in modes if mode.estimator == "two_sided"):
        model = task.model
        if mode.adapter:
            model = with_lora(copy.deepcopy(model), kind, targets)
        yield _step(Task(task.name, model, task.loss, task.sizes), mode, device)


class Ours:
    """The step under test."""

    def __init__(self, task: Task, mode: Mode, distribution: str, perturbation: str) -> None:
        self.task = task
        self.optimizer = HybridZOFO(
            task.groups(),
            estimator=mode.estimator,
            distribution=distribution,
            perturbation=perturbation,
            fo_optimizer=torch.optim.AdamW,
            seed=SEED,
        )

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.optimizer.step(self.task.closure)


def _step(task: Task, mode: Mode, device: torch.device) -> Case:
    makers: dict[str, Callable[[], Any]] = {
        f"zofo {d}, {p.replace('_', ' ')}": partial(Ours, task, mode, d, p)
        for d in DISTRIBUTIONS
        for p in PERTURBATIONS
    }
    makers["bare"] = partial(Bare, task, mode)
    name = f"{mode.name}, {task.name}"

    def check() -> None:
        for distribution in DISTRIBUTIONS:
            _check(f"{name}, {distribution}", task, mode, distribution)

    def peaks() -> dict[str, int | None]:
        with torch.no_grad():
            found = {"inference": inference_bytes(task.closure, device)}
        for n, make in makers.items():
            found[n] = peak_bytes(make().step, device)
            task.model.zero_grad()
            free_memory(device)
        return found

    zeroth = task.parameters("zo")
    sizes = [p.numel() * p.element_size() for p in zeroth]
    return Case(
        name=name,
        sizes={
            **task.sizes,
            "zo_parameters": sum(p.numel() for p in zeroth),
            "zo_tensors": len(zeroth),
            "dtype": str(task.weight.dtype).removeprefix("torch."),
        },
        variants={n: _lazily(make) for n, make in makers.items()},
        check=check,
        comparisons=list(_comparisons()),
        notes={"zo_bytes": sum(sizes), "largest_weight_bytes": max(sizes)},
        peaks=peaks,
    )


def _lazily(make: Callable[[], Any]) -> Callable[[], None]:
    """A step whose job is made by the first call, which also verifies what streaming reaches."""
    job = functools.cache(make)
    return lambda: job().step()


def _comparisons() -> Iterator[Comparison]:
    for d in DISTRIBUTIONS:
        moved, streamed = (f"zofo {d}, {p}" for p in ("in place", "streamed"))
        for n in (moved, streamed):
            yield Comparison("overhead", n, "bare", n, plus=-1, percent=True)
            memory = "peak memory over inference's"
            yield Comparison(memory, n, "inference", n, plus=-1, percent=True, of="peak_bytes")
        yield Comparison("streamed / in place =", streamed, moved, streamed)


def _check(what: str, task: Task, mode: Mode, distribution: str) -> None:
    """Steps in place against the reference; a streamed one against weights that are displaced.

    Raises:
        WrongResult: an evaluation or an update is wrong.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the others may add in any order
        moved = Ours(task, mode, distribution, "in_place")
        signs = ((0,) if mode.adapter else ()) + mode.signs
        one = partial(check_step, signs=signs, distribution=distribution)
        one(what, moved.optimizer, task.closure)
        one(f"{what}, second step", moved.optimizer, task.closure, first=False)
        _check_streamed(what, task, mode, distribution)
    task.model.zero_grad()


def _check_streamed(what: str, task: Task, mode: Mode, distribution: str) -> None:
    """Bit for bit, with the very kernels that the step in place was checked with."""
    weights = [p.detach() for p in task.parameters("zo")]
    before = [w.clone() for w in weights]
    direction = Direction(SEED, 0, 0, distribution)
    state, expected = torch.get_rng_state(), []
    for sign in mode.signs:
        perturb_(weights, direction, sign * MU)
        torch.set_rng_state(state)
        with torch.no_grad():
            expected.append(float(task.closure()))
        for w, old in zip(weights, before, strict=True):
            w.copy_(old)
    torch.set_rng_state(state)
    ours = Ours(task, mode, distribution, "streamed")
    losses: list[float] = []

    def require(right: float) -> None:
        if losses[-1] != right:
            raise WrongResult(f"{what}: streamed loss {losses[-1]:.9g}, should be {right:.9g}")

    def closure() -> Tensor:
        loss = task.closure()
        losses.append(float(loss.detach()))
        if len(losses) == 1 + int(mode.adapter):
            require(expected[0])
        return loss

    ours.optimizer.backward(closure)
    require(expected[-1])  # those between verify
    if not all(map(torch.equal, weights, before)):
        raise WrongResult(f"{what}: streamed evaluations changed the weights")
    slope, lr = ours.optimizer.projected_grads, ours.optimizer.zo_groups()[0].options["lr"]
    assert slope is not None
    ours.optimizer.step()
    update_(before, [direction], slope.reshape(1), lr)
    if not all(map(torch.equal, weights, before)):
        raise WrongResult(f"{what}: the update after streamed evaluations is wrong")


# ---- calls ------------------------------------------------------------------------------------


def _calls(device: torch.device) -> Case:
    """Torch calls without parameters, and with tiny ones, within the mode and without it."""
    layer = nn.Linear(16, 16, device=device).requires_grad_(False)
    x = torch.ones(16, device=device)
    shift = Shift(Direction(SEED, 0, 0, "rademacher"), MU)
    named = enumerate(layer.named_parameters())
    sources = {id(p): Source(p, index, name, 0, p) for index, (name, p) in named}
    calls: dict[str, Callable[[], Tensor]] = {
        "no parameter": lambda: torch.add(x, x),
        "one parameter": lambda: torch.add(x, layer.bias),
        "two parameters": lambda: nn.functional.linear(x, layer.weight, layer.bias),
    }

    def mode() -> ClosureWatch:
        return ClosureWatch(swallow=True, answer=Streaming(sources, [shift], "auto"))

    def check() -> None:
        with mode():
            found = layer.weight + 0
        right = perturbed(layer.weight, shift.direction, shift.scale, backend="reference")
        if not torch.equal(found, right):
            raise WrongResult("the mode does not perturb")

    return Case(
        name=f"{CALLS} torch calls, tiny",
        sizes={"calls": CALLS, "dtype": "float32"},
        variants={
            f"{'zofo ' if within else ''}{name}{', streamed' if within else ''}": partial(
                _repeat, call, mode if within else None
            )
            for name, call in calls.items()
            for within in (False, True)
        },
        check=check,
        comparisons=[
            Comparison("over a plain call", f"zofo {n}, streamed", n, f"zofo {n}, streamed")
            for n in calls
        ],
    )


@torch.no_grad()
def _repeat(call: Callable[[], Tensor], mode: Callable[[], ClosureWatch] | None) -> None:
    if mode is None:
        for _ in range(CALLS):
            call()
    else:
        with mode():
            for _ in range(CALLS):
                call()
