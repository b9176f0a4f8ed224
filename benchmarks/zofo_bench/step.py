"""A whole optimizer step of a MiniLM classifier, beside the bare evaluations that it contains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zofo_kernels import Direction, noise, update_
from zofo_optim import HybridZOFO, hybrid_param_groups

from . import mezo, minilm, plots
from .check import require_close, windows
from .registry import Case, Comparison, Context, WrongResult, benchmark

LR_ZO, LR_FO, MU = 1e-6, 1e-3, 1e-3
OVERHEAD_TARGET = 0.35
SLOPE_TOLERANCE = 2e-2
"""Of a projected gradient, absolute and relative: fp32 losses differ by a few 1e-7, over 2 mu."""


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


MODES = (
    Mode("ZO, one-sided", False, True, "one_sided"),
    Mode("ZO, two-sided", False, True, "two_sided"),
    Mode("FO-LoRA", True, False),
    Mode("hybrid, one-sided", True, True, "one_sided"),
    Mode("hybrid, two-sided", True, True, "two_sided"),
)


class Job:
    """A copy of the model, its batch and its loss."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], mode: Mode) -> None:
        self.mode = mode
        self.model = copy.deepcopy(model)
        self.closure = minilm.loss_closure(self.model, batch)
        if not mode.adapter:
            self.model.requires_grad_(False)

    @property
    def trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def frozen(self) -> list[Tensor]:
        """What zeroth order trains, in the order of its noise indices."""
        groups = hybrid_param_groups(self.model, verbose=False)
        return [p for group in groups if group["mode"] == "zo" for p in group["params"]]


class Ours(Job):
    """The step under test."""

    def __init__(
        self, model: nn.Module, batch: dict[str, Tensor], mode: Mode, distribution: str
    ) -> None:
        super().__init__(model, batch, mode)
        options = {"zo": {"lr": LR_ZO, "mu": MU}, "fo": {"lr": LR_FO}}
        groups = hybrid_param_groups(self.model, **options, verbose=False)  # type: ignore[arg-type]
        if not mode.zeroth_order:
            groups = [group for group in groups if group["mode"] == "fo"]
        self.distribution = distribution
        self.optimizer = HybridZOFO(
            groups,
            estimator=mode.estimator,
            distribution=distribution,
            fo_optimizer=torch.optim.AdamW,
        )

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.optimizer.step(self.closure)


class Bare(Job):
    """The same evaluations in a plain loop, with the same first-order step; nothing else."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], mode: Mode) -> None:
        super().__init__(model, batch, mode)
        self.optimizer = (
            torch.optim.AdamW(self.trained, lr=LR_FO, weight_decay=0) if mode.adapter else None
        )

    def step(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad()
            self.closure().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for _ in self.mode.signs:
                self.closure()
        if self.optimizer is not None:
            self.optimizer.step()


@benchmark("step", plot=plots.times)
def cases(context: Context) -> Iterator[Case]:
    """a whole step on 16 x 32 tokens, beside its evaluations alone (overhead) and MeZO's loop"""
    plain = minilm.classifier(tiny=context.quick).to(context.device)
    adapted = minilm.with_lora(copy.deepcopy(plain))
    rows, tokens = (2, 8) if context.quick else (16, 32)
    batch = minilm.random_batch(plain, rows, tokens, context.device)
    for dropout in (True,) if context.quick else (True, False):
        for mode in MODES:
            model = (adapted if mode.adapter else plain).train(dropout)
            yield _case(model, batch, mode, dropout)


def _case(model: nn.Module, batch: dict[str, Tensor], mode: Mode, dropout: bool) -> Case:
    name = f"{mode.name}, {'dropout' if dropout else 'no dropout'}"
    distributions = ("gaussian", "rademacher") if mode.zeroth_order else ("gaussian",)
    ours = {
        f"zofo {d}" if mode.zeroth_order else "zofo": Ours(model, batch, mode, d)
        for d in distributions
    }
    bare = Bare(model, batch, mode)
    variants: dict[str, Callable[[], object]] = {n: job.step for n, job in ours.items()}
    variants["bare"] = bare.step
    comparisons = [
        Comparison("overhead", n, "bare", n, plus=-1, percent=True, at_most=OVERHEAD_TARGET)
        for n in ours
    ]
    if not mode.adapter and mode.estimator == "two_sided":
        published = Job(model, batch, mode)
        variants["MeZO"] = mezo.MeZO(published.frozen, published.closure, lr=LR_ZO, eps=MU).step
        comparisons += [Comparison("MeZO / this =", "MeZO", n, n) for n in ours]
        comparisons.append(Comparison("overhead", "MeZO", "bare", "MeZO", plus=-1, percent=True))

    def check() -> None:
        for n, job in ours.items():
            check_step(f"{name} {n}", job, Bare(model, batch, mode))

    first = next(iter(ours.values()))
    tokens = batch["input_ids"]
    return Case(
        name=name,
        sizes={
            "rows": tokens.shape[0],
            "tokens": tokens.shape[1],
            "zo_parameters": sum(p.numel() for p in first.frozen) if mode.zeroth_order else 0,
            "zo_tensors": len(first.frozen) if mode.zeroth_order else 0,
            "fo_parameters": sum(p.numel() for p in first.trained),
            "dtype": "float32",
        },
        variants=variants,
        check=check,
        comparisons=comparisons,
        notes={
            "forwards_without_gradients": len(mode.signs),
            "forward_backwards": int(mode.adapter),
            "fo_optimizer": "AdamW" if mode.adapter else None,
        },
    )


def check_step(what: str, ours: Ours, bare: Bare) -> None:
    """One step of ours, against the formulas worked out on an equal model.

    First-order weights must be bit-equal to those of the bare loop, projected gradients close to
    finite differences taken by hand, and zeroth-order weights close to the reference's update.

    Raises:
        WrongResult: they are not.
    """
    frozen = bare.frozen if ours.mode.zeroth_order else []
    before = [p.detach().clone() for p in frozen]
    direction = Direction(0, 0, 0, ours.distribution)
    torch.manual_seed(11)
    ours.step()
    _replayed_backward(bare)
    slope = _slope_by_hand(bare, frozen, direction)
    if bare.optimizer is not None:
        bare.optimizer.step()
    for got, expected in zip(ours.trained, bare.trained, strict=True):
        if not torch.equal(got, expected):
            raise WrongResult(f"{what}: first-order weights differ from a plain loop's")
    if slope is None:
        return
    found = ours.optimizer.projected_grads
    assert found is not None
    if not abs(float(found) - slope) <= SLOPE_TOLERANCE * (1 + abs(slope)):
        raise WrongResult(f"{what}: projected gradient {float(found):.5g}, by hand {slope:.5g}")
    _check_update(what, ours, before, direction, found.reshape(1))


def _replayed_backward(bare: Bare) -> None:
    """The evaluation with gradients, from the random state that every evaluation starts from."""
    if bare.optimizer is not None:
        torch.manual_seed(11)
        bare.closure().backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _slope_by_hand(bare: Bare, frozen: list[Tensor], direction: Direction) -> float | None:
    """The projected gradient from weights displaced by plain arithmetic; weights are restored."""
    if not frozen:
        return None
    device = frozen[0].device
    kept = [p.clone() for p in frozen]
    z = [noise(p.shape, direction, index=i, device=device) for i, p in enumerate(frozen)]
    losses = {}
    for sign in (1, -1 if bare.mode.estimator == "two_sided" else 0):
        for p, start, values in zip(frozen, kept, z, strict=True):
            p.copy_(start + sign * MU * values)
        torch.manual_seed(11)
        losses[sign] = float(bare.closure())
    for p, start in zip(frozen, kept, strict=True):
        p.copy_(start)
    (high, high_loss), (low, low_loss) = losses.items()
    return (high_loss - low_loss) / ((high - low) * MU)


def _check_update(
    what: str, ours: Ours, before: list[Tensor], direction: Direction, found: Tensor
) -> None:
    """Windows of every zeroth-order tensor against the reference's update."""
    pieces = [(i, a, b) for i, p in enumerate(before) for a, b in windows(p.numel(), 256, 2)]
    starts = [before[i].view(-1)[a:b].clone() for i, a, b in pieces]
    expected = [start.clone() for start in starts]
    update_(
        expected,
        [direction],
        found,
        LR_ZO,
        indices=[i for i, _, _ in pieces],
        offsets=[a for _, a, _ in pieces],
        backend="reference",
    )
    after = ours.frozen
    got = [after[i].detach().view(-1)[a:b] for i, a, b in pieces]
    require_close(
        what,
        torch.cat(starts),
        torch.cat(got),
        torch.cat(expected),
        noise=LR_ZO * abs(float(found)),
        ulps=4,  # two displacements, taken back by rounding arithmetic
        reach=6 * MU,
    )
