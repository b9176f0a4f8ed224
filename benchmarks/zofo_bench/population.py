"""A population in one generate(), a direction for each pair of rows, beside a plain one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zofo_kernels import noise, perturb_
from zofo_optim import HybridZOFO, hybrid_param_groups

from . import decoders, plots
from .measure import free_memory, peak_bytes
from .registry import Case, Comparison, Context, WrongResult, benchmark

LR, MU, SEED = 1e-4, 2e-2, 7
RANKS = (1, 4)
PROMPT = 8  # tokens
SPEED_TARGET = 0.9
"""Of plain generation's tokens a second, at widths from WIDE on, 64 rows, rank 1, fp32."""
WIDE = 1024
MEMORY_TARGET = 0.05
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Of a row's score, relative, beside that of displaced weights, which in bf16 are off by 4 %."""
ROUNDING = 1e-5
LARGE_LR = 1e-2
"""Of the updates that are checked."""

POPULATION: dict[str, Any] = {
    "structure": "low_rank",
    "perturbation": "streamed",
    "directions": "per_example",
    "estimator": "antithetic",
}


@dataclass(frozen=True)
class Size:
    """Of a Llama, and of what it generates."""

    width: int
    layers: int
    rows: int
    tokens: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        plural = "s" * (self.layers > 1)
        return f"width {self.width}, {self.layers} layer{plural}, {self.rows} rows, {kind}"

    def decoder(self) -> decoders.Decoder:
        options = {
            "vocab_size": 512,
            "hidden_size": self.width,
            "intermediate_size": self.width * 43 // 16,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(self.width // 64, 8),
            "num_key_value_heads": max(self.width // 64, 4),
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        return decoders.Decoder(self.name, "llama", options)


BF16 = torch.bfloat16
QUICK = [Size(32, 1, 4, 4), Size(32, 1, 4, 4, BF16)]
SIZES = [
    Size(64, 5, 64, 16),
    Size(64, 5, 128, 16),  # about stories260k's
    Size(64, 5, 64, 16, BF16),
    Size(256, 4, 64, 16),
    Size(256, 4, 128, 8),
    Size(256, 4, 64, 8, BF16),
    Size(512, 2, 64, 16),
    Size(512, 2, 64, 8, BF16),
    Size(1024, 2, 64, 32),
    Size(1024, 2, 128, 8),
    Size(1024, 2, 64, 8, BF16),
    Size(2048, 1, 64, 8),
    Size(2048, 1, 64, 8, BF16),
]


@benchmark("population", plot=plots.steps)
def cases(context: Context) -> Iterator[Case]:
    """a population in one generate(), a low-rank direction for each pair of rows"""
    for size in QUICK if context.quick else SIZES:
        yield _case(Task(size, context.device), context)
        free_memory(context.device)


class Task:
    """A frozen model, and what it generates from random prompts, greedily."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        self.model = decoders.build(size.decoder(), device, size.dtype)
        self.prompts = decoders.random_tokens(self.model, size.rows // 2, PROMPT, device)

    def tokens(self, prompts: Tensor) -> Tensor:
        generate: Callable[..., Tensor] = self.model.generate  # type: ignore[assignment]
        return generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            use_cache=True,
            min_new_tokens=self.size.tokens,
            max_new_tokens=self.size.tokens,
        )[:, PROMPT:]

    def scores(self, prompts: Tensor) -> Tensor:
        """The share of even tokens, a row."""
        return (self.tokens(prompts) % 2 == 0).float().mean(1)

    def evidence(self, prompts: Tensor) -> Tensor:
        """A number for each row that any displacement changes: a prompt's, and a lone token's."""
        both = [self.model(ids).logits[:, -1].float() for ids in (prompts, prompts[:, -1:])]
        return torch.cat(both, 1).square().mean(1)

    @property
    def pairs(self) -> Tensor:
        """A prompt for each pair of rows."""
        return self.prompts.repeat_interleave(2, 0)

    def optimizer(self, lr: float = LR, **options: Any) -> HybridZOFO:
        zo = dict(lr=lr, mu=MU)
        groups = hybrid_param_groups(self.model, zo, directions="per_example", verbose=False)
        return HybridZOFO(groups, seed=SEED, **options)


class Population:
    """Steps of a whole population, and its evaluation alone."""

    def __init__(self, task: Task, rank: int) -> None:
        self.optimizer = task.optimizer(rank=rank, **POPULATION)
        self._closure = partial(task.scores, task.pairs)
        self.optimizer.verify(partial(task.evidence, task.pairs[:4]))  # few rows: it takes long

    def step(self) -> None:
        self.optimizer.step(self._closure)

    def evaluate(self) -> None:
        self.optimizer.backward(self._closure)
        self.optimizer.zero_grad()


class OnePair:
    """The recipe of one full-size direction a pass: a row for each of its sides."""

    def __init__(self, task: Task) -> None:
        self._optimizer = task.optimizer()
        self._closure = lambda: task.scores(task.prompts[:1]).mean()
        self._optimizer.verify(lambda: task.evidence(task.prompts[:1]).mean())

    def step(self) -> None:
        self._optimizer.step(self._closure)


def _case(task: Task, context: Context) -> Case:
    size, device = task.size, context.device
    populations = {rank: functools.cache(partial(Population, task, rank)) for rank in RANKS}
    pair = functools.cache(partial(OnePair, task))

    def plain() -> None:
        with torch.no_grad():
            task.scores(task.pairs)

    variants: dict[str, Callable[[], object]] = {"plain": plain}
    for rank, made in populations.items():
        variants[_evaluation(rank)] = partial(_call, made, Population.evaluate)
        variants[_step(rank)] = partial(_call, made, Population.step)
    variants[ONE_PAIR] = lambda: pair().step()

    def peaks() -> dict[str, int | None]:
        plain()  # or what is made once would count
        found = {"plain": peak_bytes(plain, device)}
        for rank in RANKS:
            job = Population(task, rank)
            job.step()
            found[_step(rank)] = peak_bytes(job.step, device)
            del job
            free_memory(device)
        return found

    weights = list(task.model.parameters())
    return Case(
        name=f"generate(), {size.name}",
        sizes={
            "width": size.width,
            "layers": size.layers,
            "rows": size.rows,
            "prompt_tokens": PROMPT,
            "new_tokens": size.tokens,
            "zo_parameters": sum(w.numel() for w in weights),
            "dtype": str(size.dtype).removeprefix("torch."),
        },
        variants=variants,
        check=partial(_check, task),
        comparisons=list(_comparisons(size, device)),
        notes={"mu": MU, "pairs": size.rows // 2},
        peaks=peaks,
    )


def _call(made: Callable[[], Population], what: Callable[[Population], None]) -> None:
    what(made())


ONE_PAIR = "zofo full, in place, one pair"


def _evaluation(rank: int) -> str:
    return f"zofo rank {rank}, evaluation"


def _step(rank: int) -> str:
    return f"zofo rank {rank}, step"


def _comparisons(size: Size, device: torch.device) -> Iterator[Comparison]:
    goal = size.width >= WIDE and size.rows == 64 and size.dtype == torch.float32
    for rank in RANKS:
        for name in (_evaluation(rank), _step(rank)):
            target = SPEED_TARGET if goal and rank == 1 and device.type == "cpu" else None
            if name == _step(rank):
                target = None  # its update is made once, however many tokens there are
            yield Comparison("tokens a second kept", "plain", name, name, at_least=target)
        yield Comparison(
            "peak memory over plain generation's",
            _step(rank),
            "plain",
            _step(rank),
            plus=-1,
            percent=True,
            at_most=MEMORY_TARGET if rank == 1 else None,
            of="peak_bytes",
        )
        yield Comparison(
            "one full direction a pass / this =",
            ONE_PAIR,
            _step(rank),
            _step(rank),
            times=size.rows / 2,
        )


# ---- checks -----------------------------------------------------------------------------------


def _check(task: Task) -> None:
    """Rows of two pairs against displaced weights, and the update against the noise written out.

    Raises:
        WrongResult: one of them is wrong.
    """
    with torch.no_grad():
        for rank in RANKS:
            _check_rank(task, rank)


def _check_rank(task: Task, rank: int) -> None:
    what = f"{task.size.name}, rank {rank}"
    optimizer = task.optimizer(lr=LARGE_LR, rank=rank, **POPULATION)
    (group,) = optimizer.zo_groups()
    weights, before = _weights(task.model, group.names)
    directions = [group.direction(pair) for pair in range(2)]
    z = [[noise(w.shape, d, index=k) for d in directions] for k, w in enumerate(weights)]
    prompts, right = task.pairs[:4], torch.empty(4)
    for row in range(4):
        scale = -MU if row % 2 else MU
        perturb_(weights, directions[row // 2], scale)
        _require(f"{what}: a displacement", weights, before, [scale * e[row // 2] for e in z])
        right[row] = task.evidence(prompts[row : row + 1])
        _put_back(weights, before)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(task.evidence(prompts))
        return seen[-1]

    optimizer.backward(closure)
    off = ((seen[0].cpu() - right) / right).abs().max()
    if not off <= TOLERANCE[task.size.dtype]:
        raise WrongResult(f"{what}: a row's score is off by {float(off):.3g}")
    slopes = optimizer.projected_grads
    assert slopes is not None
    optimizer.step()
    steps = [-LARGE_LR / 2 * slope for slope in slopes[0]]
    moves = [steps[0] * one + steps[1] * other for one, other in z]
    _require(f"{what}: the update", weights, before, moves)
    _put_back(weights, before)


def _require(what: str, weights: list[Tensor], before: list[Tensor], moves: list[Tensor]) -> None:
    for w, old, move in zip(weights, before, moves, strict=True):
        off = (w.float() - (old.float() + move)).abs().max()
        largest = float(torch.maximum(old.abs(), w.abs()).max())
        if not off <= ROUNDING + 2 * torch.finfo(w.dtype).eps * largest:
            raise WrongResult(f"{what} is off by {float(off):.3g}")


def _weights(model: nn.Module, names: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The optimizer's, and copies of them."""
    known = dict(model.named_parameters())
    weights = [known[name].detach() for name in names]
    return weights, [w.clone() for w in weights]


def _put_back(weights: list[Tensor], before: list[Tensor]) -> None:
    for w, old in zip(weights, before, strict=True):
        w.copy_(old)
