"""Update rules: from a group's coefficients to those that its update uses.

A rule is a pair of functions, as in optax: ``init()`` says what it remembers from step to step, and
``update(coefficients, state)`` gives new ones of both. It knows no directions and no weights.

Coefficients are slopes over their number, so a rule takes any number of samples in each step. One
that is exactly 0 is a slope that was not finite, or of two equal losses: it stays 0, and counts
nowhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .plain import plain

State = Mapping[str, Tensor]
"""What a rule remembers of one group: 0-dim tensors by name."""


class Rule(ABC):
    """From the coefficients of a step to those of its update; the same for every group.

    A rule of your own is a frozen dataclass, since state dicts and journals name it by its
    ``repr``. It must not wait for the device.

    Example:
        >>> @dataclass(frozen=True)
        ... class Halved(Rule):
        ...     def update(self, coefficients, state):
        ...         return coefficients / 2, state
        >>> optimizer = HybridZOFO(model.parameters(), lr=1e-6, mode="zo", zo_rule=Halved())
    """

    min_samples: ClassVar[int] = 1
    """Fewer samples in a step are refused."""

    def init(self) -> dict[str, float]:
        """The state before the first step, by name; empty where nothing is remembered."""
        return {}

    @abstractmethod
    def update(self, coefficients: Tensor, state: State) -> tuple[Tensor, State]:
        """What the update uses, and the state after it. Changes neither argument.

        Args:
            coefficients: of one group, shape (samples,), on the loss's device.
            state: as ``init`` names it, on the same device, in fp64 where the device has it.

        Returns:
            Coefficients of the same shape and dtype, and all of the state.
        """


@dataclass(frozen=True)
class SGD(Rule):
    """Gradient descent along the estimate (Ma, Yu, Huang 2026, Algorithm 1)."""

    def update(self, coefficients: Tensor, state: State) -> tuple[Tensor, State]:
        return coefficients, state


@dataclass(frozen=True)
class Normalized(Rule):
    """Slopes over their running root mean square, so that one rate serves several models.

    ``lr`` is then the size of a step along a direction whose elements have variance 1, whatever
    the loss's scale. The mean takes the step's own slopes in first, and its early values are
    corrected as Adam's are: the first step has size ``lr`` exactly, with one sample.

    Args:
        beta: weight of the past in the mean of squares, in [0, 1); 0 takes each step's own.
        eps: added to the root mean square, > 0; slopes far below it hardly move the weights.

    Raises:
        ValueError: an argument out of its range.
    """

    beta: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check_beta(self)
        _check_positive(self, "eps")

    def init(self) -> dict[str, float]:
        return dict(_NO_SQUARES)

    def update(self, coefficients: Tensor, state: State) -> tuple[Tensor, State]:
        wide, known = _known(coefficients)
        slopes = wide * wide.numel()
        state = _with_squares(state, slopes, known, self.beta)
        return _coefficients(slopes / (_size(state) + self.eps), known, coefficients), state


@dataclass(frozen=True)
class Clip(Rule):
    """Slopes that are limited in size, against rare large ones.

    Args:
        limit: the largest size, > 0: in units of the running root mean square of the slopes
            before this step, or in those of the slopes themselves. Clipped slopes enter the
            mean, so one outlier does not raise the limit of the next; the first step's slopes
            have no limit.
        relative: whether it is in those units.
        beta: weight of the past in the mean of squares, in [0, 1), where ``relative``.

    Raises:
        ValueError: an argument out of its range.
    """

    limit: float = 3.0
    relative: bool = True
    beta: float = 0.99

    def __post_init__(self) -> None:
        _check_positive(self, "limit")
        _check_beta(self)
        relative = plain(self.relative)
        if not isinstance(relative, bool):
            raise ValueError(f"relative of Clip must be True or False, got {relative!r}")
        object.__setattr__(self, "relative", relative)

    def init(self) -> dict[str, float]:
        return dict(_NO_SQUARES) if self.relative else {}

    def update(self, coefficients: Tensor, state: State) -> tuple[Tensor, State]:
        wide, known = _known(coefficients)
        slopes = wide * wide.numel()
        limit = torch.full_like(slopes, self.limit)
        if self.relative:
            size = _size(state)
            limit = torch.where(size > 0, limit * size, math.inf)
            state = _with_squares(state, slopes.clamp(-limit, limit), known, self.beta)
        clipped = _coefficients(slopes.clamp(-limit, limit), known, coefficients)
        # what is not clipped keeps its bits, which its slope may not give back
        return torch.where(known & (slopes.abs() <= limit), coefficients, clipped), state


@dataclass(frozen=True)
class Sign(Rule):
    """The slopes' signs: every direction moves the weights by ``lr`` over the samples' number."""

    def update(self, coefficients: Tensor, state: State) -> tuple[Tensor, State]:
        wide, known = _known(coefficients)
        return _coefficients(wide.sign(), known, coefficients), state


@dataclass(frozen=True)
class ZScore(Rule):
    """Slopes less their mean, over their standard deviation: both of the samples of the step.

    The deviation is that of the samples themselves (divided by their number).

    One slope alone has no deviation, and moves nothing.

    Args:
        eps: added to the standard deviation, > 0.

    Raises:
        ValueError: an argument out of its range.
    """

    min_samples: ClassVar[int] = 2
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check_positive(self, "eps")

    def update(self, coefficients: Tensor, state: State) -> tuple[Tensor, State]:
        wide, known = _known(coefficients)
        count = known.sum().clamp(min=1)
        # from the lowest one, so that equal slopes have no deviation at all
        lowest = torch.where(known, wide, math.inf).amin()
        above = torch.where(known, (wide - lowest) * wide.numel(), 0.0)
        centred = torch.where(known, above - above.sum() / count, 0.0)
        deviation = (centred.square().sum() / count).sqrt()
        return _coefficients(centred / (deviation + self.eps), known, coefficients), state


@dataclass(frozen=True)
class CenteredRank(Rule):
    """The slopes' ranks in the step, from -1/2 (the lowest) to 1/2; equal ones share theirs.

    One slope alone has the middle rank, 0, and moves nothing.
    """

    min_samples: ClassVar[int] = 2

    def update(self, coefficients: Tensor, state: State) -> tuple[Tensor, State]:
        wide, known = _known(coefficients)
        count = known.sum()
        ordered = torch.where(known, wide, math.inf).sort().values
        below = torch.searchsorted(ordered, wide)
        up_to = torch.searchsorted(ordered, wide, right=True)
        # twice the mean rank of the equal ones is below + up_to - 1, from 0 to 2 (count - 1)
        ranks = (below + up_to - count) / (2 * (count - 1).clamp(min=1)).to(wide.dtype)
        return _coefficients(ranks, known, coefficients), state


RULES: dict[str, type[Rule]] = {
    "sgd": SGD,
    "normalized": Normalized,
    "clip": Clip,
    "sign": Sign,
    "zscore": ZScore,
    "centered_rank": CenteredRank,
}


def rule_of(chosen: Any) -> Rule:
    """The rule that ``zo_rule=`` names, or is.

    Raises:
        ValueError: there is none of this name.
        TypeError: it is neither a name nor a rule.
    """
    if isinstance(chosen, Rule):
        return chosen
    if isinstance(chosen, type) and issubclass(chosen, Rule):
        raise TypeError(
            f"zo_rule must be a name or a Rule, got the class {chosen.__name__}; "
            f"pass {chosen.__name__}()"
        )
    if not isinstance(chosen, str):
        raise TypeError(f"zo_rule must be a name or a Rule, got {chosen!r}")
    if chosen not in RULES:
        raise ValueError(f"zo_rule must be one of {tuple(RULES)} or a Rule, got {chosen!r}")
    return RULES[chosen]()


def check_repr(rule: Rule) -> None:
    """
    Raises:
        TypeError: its repr is another one in every process, so that nothing can name it by it.
    """
    if type(rule).__repr__ is object.__repr__ or " at 0x" in repr(rule):
        raise TypeError(
            "zo_rule must be a frozen dataclass, or have a repr that says its options, got "
            f"{rule!r}: state dicts and journals name rules by it"
        )


def described(rule: Rule) -> str:
    """With all its options, also where it was asked for by name; as state dicts have it."""
    return "sgd" if isinstance(rule, SGD) else repr(rule)


def widest(device: torch.device) -> torch.dtype:
    """The widest dtype of a device, in which rules compute and remember."""
    return torch.float32 if device.type == "mps" else torch.float64


# ---- slopes -----------------------------------------------------------------------------------


def _known(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients, wide, and which of their slopes are known; others are 0.

    Not known are those that were not finite, and those whose square is not: none of a model that
    learns, but a sum over micro-batches may come to that.
    """
    wide = coefficients.to(widest(coefficients.device))
    known = (wide != 0) & (wide * wide.numel()).square().isfinite()
    return torch.where(known, wide, 0.0), known


def _coefficients(slopes: Tensor, known: Tensor, like: Tensor) -> Tensor:
    """What a rule made of slopes, over their number, in the dtype of ``like``."""
    return torch.where(known, slopes / like.numel(), 0.0).to(like.dtype)


# ---- the running mean of squares --------------------------------------------------------------

_NO_SQUARES = {"mean_square": 0.0, "weight": 0.0}
"""Both begin at 0 and decay alike: their quotient is the mean of what came, with no bias."""


def _with_squares(state: State, slopes: Tensor, known: Tensor, beta: float) -> State:
    """The state with the mean square of this step's known slopes in it; others are 0."""
    mean = (slopes.square() / known.sum().clamp(min=1)).sum()
    now = {"mean_square": mean, "weight": torch.ones_like(mean)}
    return {
        name: torch.where(known.any(), beta * state[name] + (1 - beta) * new, state[name])
        for name, new in now.items()
    }


def _size(state: State) -> Tensor:
    """The running root mean square; 0 where there is none yet."""
    weight = state["weight"]
    return torch.where(weight > 0, state["mean_square"] / weight, 0.0).sqrt()


# ---- options ----------------------------------------------------------------------------------


def _check_beta(rule: Rule) -> None:
    _check(rule, "beta", lambda value: 0.0 <= value < 1.0, "a number in [0, 1)")


def _check_positive(rule: Rule, name: str) -> None:
    _check(rule, name, lambda value: 0.0 < value < math.inf, "a finite number > 0")


def _check(rule: Rule, name: str, sound: Callable[[float], bool], wanted: str) -> None:
    """Raise ValueError where an option is not as ``wanted``; make it a float."""
    value = plain(getattr(rule, name))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not sound(value):
        raise ValueError(f"{name} of {type(rule).__name__} must be {wanted}, got {value!r}")
    object.__setattr__(rule, name, float(value))
