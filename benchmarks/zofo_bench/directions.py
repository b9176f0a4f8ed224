"""Steps along low-rank directions, shared and one an example, beside full ones and MeZO's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zofo_kernels import noise, perturb_
from zofo_optim import HybridZOFO, hybrid_param_groups

from . import decoders, mezo, minilm, plots
from .measure import free_memory, peak_bytes
from .registry import Case, Comparison, Context, WrongResult, benchmark

LR, MU, SEED = 1e-6, 1e-3, 7
OVERHEAD_TARGET = 0.15
"""Of low-rank steps over their bare evaluations, on the CPU."""
MEMORY_TARGET = 0.02
SLOPE_TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 1.0}
"""Of slopes, beside those of displaced weights."""
UPDATE_TOLERANCE = 1e-6

Closure = Callable[[], Tensor]


@dataclass(frozen=True)
class Way:
    """How a step evaluates and moves."""

    name: str
    options: dict[str, Any]

    @property
    def per_example(self) -> bool:
        return self.options.get("directions") == "per_example"


LOW_RANK = {"structure": "low_rank", "perturbation": "streamed"}
SIGNS = {"distribution": "rademacher"}
EXAMPLES = {**LOW_RANK, "directions": "per_example"}
WAYS = (
    Way("zofo full, in place", {}),
    Way("zofo full, streamed", {"perturbation": "streamed"}),
    Way("zofo rank 1, in place", {"structure": "low_rank"}),
    Way("zofo rank 1, streamed", LOW_RANK),
    Way("zofo rank 1 of ±1, streamed", {**LOW_RANK, **SIGNS}),
    Way("zofo rank 1, an example", EXAMPLES),
    Way("zofo rank 1 of ±1, an example", {**EXAMPLES, **SIGNS}),
)
TARGETS = tuple(way.name for way in WAYS if LOW_RANK.items() <= way.options.items())


@dataclass(frozen=True)
class Task:
    """A frozen model, and the losses of a batch's examples, shape (B,)."""

    name: str
    model: nn.Module
    losses_of: Callable[[nn.Module], Tensor]
    sizes: dict[str, Any]

    def losses(self) -> Tensor:
        return self.losses_of(self.model)

    def closure(self, way: Way) -> Closure:
        return self.losses if way.per_example else lambda: self.losses().mean()

    def optimizer(self, way: Way, lr: float = LR) -> HybridZOFO:
        groups = hybrid_param_groups(
            self.model, dict(lr=lr, mu=MU), directions="per_example", verbose=False
        )
        return HybridZOFO(groups, seed=SEED, **way.options)

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.optimizer(WAYS[0]).param_groups[0]["params"]]


@benchmark("directions", plot=plots.steps)
def cases(context: Context) -> Iterator[Case]:
    """a two-sided step along low-rank directions, shared or one an example, over its forwards"""
    yield _case(_minilm(context), context)
    free_memory(context.device)
    for decoder, dtype, rows, tokens in _decoders(context):
        yield _case(_decoder(decoder, dtype, rows, tokens, context.device), context)
        free_memory(context.device)


def _minilm(context: Context) -> Task:
    model = minilm.classifier(tiny=context.quick).to(context.device).requires_grad_(False).eval()
    rows, tokens = (2, 8) if context.quick else (16, 32)
    batch = minilm.random_batch(model, rows, tokens, context.device)
    labels = batch.pop("labels")

    def losses(model: nn.Module) -> Tensor:
        logits = model(**batch).logits.float()
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    return Task("MiniLM float32", model, losses, {"rows": rows, "tokens": tokens})


def _decoders(context: Context) -> list[tuple[decoders.Decoder, torch.dtype, int, int]]:
    both = (torch.float32, torch.bfloat16)
    if context.quick:
        return [(decoders.TINY, dtype, 2, 8) for dtype in both]
    if context.device.type == "cpu":
        sizes = ((1, 64), (4, 64), (8, 256))
        return [(decoders.SMALL, dtype, *size) for dtype in both for size in sizes]
    sizes = ((1, 64), (4, 128), (16, 128))
    return [(decoders.OPT_1_3B, torch.bfloat16, *size) for size in sizes]


def _decoder(
    decoder: decoders.Decoder, dtype: torch.dtype, rows: int, tokens: int, device: torch.device
) -> Task:
    model = decoders.build(decoder, device, dtype)
    ids = decoders.random_tokens(model, rows, tokens, device)
    mask = torch.ones_like(ids)

    def losses(model: nn.Module) -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        flat = nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        return flat.view(rows, -1).mean(1)

    name = f"{decoder.name} {str(dtype).removeprefix('torch.')}, {rows * tokens} tokens"
    return Task(name, model, losses, {"rows": rows, "tokens": tokens})


class Ours:
    """The step under test."""

    def __init__(self, task: Task, way: Way) -> None:
        self.optimizer, self.closure = task.optimizer(way), task.closure(way)

    def step(self) -> None:
        self.optimizer.step(self.closure)


class Bare:
    """Its two evaluations."""

    def __init__(self, task: Task) -> None:
        self.losses = task.losses

    def step(self) -> None:
        with torch.no_grad():
            for _ in range(2):
                self.losses().mean()


def _published(task: Task) -> mezo.MeZO:
    """MeZO's recipe, which moves the weights to new memory: of its own."""
    task = copy.deepcopy(task)
    (group,) = task.optimizer(WAYS[0]).param_groups
    return mezo.MeZO(group["params"], lambda: task.losses().mean(), lr=LR, eps=MU)


def _case(task: Task, context: Context) -> Case:
    makers: dict[str, Callable[[], Any]] = {way.name: partial(Ours, task, way) for way in WAYS}
    makers["bare"] = partial(Bare, task)
    makers["MeZO"] = partial(_published, task)

    def peaks() -> dict[str, int | None]:
        with torch.no_grad():
            found = {"inference": peak_bytes(lambda: task.losses().mean(), context.device)}
        for name, make in makers.items():
            found[name] = peak_bytes(make().step, context.device)
            free_memory(context.device)
        return found

    weights = task.weights
    return Case(
        name=f"ZO, two-sided, {task.name}",
        sizes={
            **task.sizes,
            "zo_parameters": sum(w.numel() for w in weights),
            "zo_tensors": len(weights),
            "dtype": str(weights[0].dtype).removeprefix("torch."),
        },
        variants={name: _lazily(make) for name, make in makers.items()},
        check=partial(_check, task),
        comparisons=list(_comparisons(context.device)),
        notes={"mu": MU},
        peaks=peaks,
    )


def _lazily(make: Callable[[], Any]) -> Callable[[], None]:
    """A step whose job is made by the first call, which also verifies."""
    job = functools.cache(make)
    return lambda: job().step()


def _comparisons(device: torch.device) -> Iterator[Comparison]:
    for name in [*(way.name for way in WAYS), "MeZO"]:
        on_cpu = name in TARGETS and device.type == "cpu"
        target = OVERHEAD_TARGET if on_cpu else None
        yield Comparison("overhead", name, "bare", name, plus=-1, percent=True, at_most=target)
        target = MEMORY_TARGET if name in TARGETS else None
        over = partial(Comparison, shown_at=name, plus=-1, percent=True, of="peak_bytes")
        yield over("peak memory over inference's", name, "inference", at_most=target)
        if name != "MeZO":
            yield Comparison("MeZO / this =", "MeZO", name, name)


# ---- checks -----------------------------------------------------------------------------------


def _check(task: Task) -> None:
    """Slopes against displaced weights, and the update against the noise written out.

    Raises:
        WrongResult: one of them is wrong.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        for way in WAYS:
            _check_way(f"{task.name}, {way.name}", task, way)


def _check_way(what: str, task: Task, way: Way) -> None:
    optimizer = task.optimizer(way, lr=1e-2)
    weights, before = task.weights, [w.clone() for w in task.weights]
    (group,) = optimizer.zo_groups()
    closure = task.closure(way)
    optimizer.backward(closure)
    found = optimizer.projected_grads
    assert found is not None
    slopes = found[0]
    directions = [group.direction(sample) for sample in range(len(slopes))]
    for example, direction in enumerate(directions):
        ends = []
        for sign in (1, -1):
            perturb_(weights, direction, sign * MU)
            loss = closure()
            ends.append(float(loss[example] if way.per_example else loss))
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)
        right = (ends[0] - ends[1]) / (2 * MU)
        if not abs(float(slopes[example]) - right) <= SLOPE_TOLERANCE[weights[0].dtype]:
            raise WrongResult(f"{what}: slope {float(slopes[example]):.6g}, should be {right:.6g}")
    optimizer.step()
    for index, (w, old) in enumerate(zip(weights, before, strict=True)):
        z = [noise(w.shape, d, index=index, dtype=torch.float64) for d in directions]
        moved = sum(float(c) / len(z) * each for c, each in zip(slopes, z, strict=True))
        off = (w.double() - (old.double() - 1e-2 * moved)).abs().max()
        largest = float(torch.maximum(old.abs(), w.abs()).max())
        room = UPDATE_TOLERANCE + 2 * torch.finfo(w.dtype).eps * largest
        if not off <= room:
            raise WrongResult(f"{what}: the update is off by {float(off):.3g}")
        w.copy_(old)
