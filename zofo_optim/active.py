"""Which parameters of a group a step moves: all, a random part, or parts that take turns."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .names import matching, patterns_in
from .plain import plain

BY = ("tensor", "layer")
_LAYER = re.compile(r"^(.*?\.)?\d+(?=\.|$)")
"""A name up to its first number: ``model.layers.3`` of ``model.layers.3.mlp.up_proj.weight``."""
_INDEX = 1 << 64


class Chosen(NamedTuple):
    """Of one group, in one step."""

    positions: tuple[int, ...]
    """Of the parameters that move, in order, among the group's."""
    scale: float
    """What slopes are multiplied by: 1 / the probability of each, where they are drawn."""


class Active(ABC):
    """What ``HybridZOFO(active=...)`` may be; see :class:`Draw` and :class:`Cycle`.

    The choice depends on the group's names, seed, step and position alone, so that it is the same
    in all evaluations of a step, after resuming, and on every machine.
    """

    needs_names = True
    """Whether groups must name their parameters."""
    changes = True
    """Whether steps differ, so that the host must know which one it is."""

    @abstractmethod
    def choose(self, names: Sequence[str], seed: int, step: int, group: int) -> Chosen:
        """Of a group's parameters, those of one step.

        Args:
            names: of its parameters.
            seed, step: the group's.
            group: its position among the zeroth-order groups.
        """

    def ever(self, names: Sequence[str]) -> tuple[int, ...]:
        """Of a group's parameters, those that some step moves."""
        return tuple(range(len(names)))

    @abstractmethod
    def described(self) -> Any:
        """In plain values, as ``active=`` takes it or as one writes it."""

    def check(self, names: Sequence[Sequence[str]]) -> None:  # noqa: B027  # not all can fail
        """
        Raises:
            ValueError: it leaves a step without parameters, given those of all groups.
        """


@dataclass(frozen=True)
class Draw(Active):
    """A random part of the parameters in each step, drawn uniformly, without replacement.

    Of N parameters of a group, k = max(1, round(fraction N)) move. Slopes are multiplied by N / k,
    so that the mean estimate is the gradient of all of them; and so is the weight decay of those
    that move. Where they have one size, the variance is that of a direction for all, as fewer
    elements share each slope. What is saved are passes over the weights.

    Args:
        fraction: in (0, 1].
        by: draw "tensor" by tensor, or "layer" by layer: what has the same name up to its first
            number, such as ``model.layers.3``; a parameter without a number is by itself.

    Raises:
        TypeError, ValueError: an argument that cannot be.
    """

    fraction: float
    by: str = "tensor"

    def __post_init__(self) -> None:
        fraction = plain(self.fraction)
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
            raise TypeError(f"fraction must be a number in (0, 1], got {fraction!r}")
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"fraction must be in (0, 1], got {fraction!r}")
        if self.by not in BY:
            raise ValueError(f"by must be one of {BY}, got {self.by!r}")
        object.__setattr__(self, "fraction", float(fraction))

    @property
    def needs_names(self) -> bool:  # type: ignore[override]
        return self.by == "layer"

    def choose(self, names: Sequence[str], seed: int, step: int, group: int) -> Chosen:
        units = self._units(names)
        count = len(units)
        if not count:
            return Chosen((), 1.0)
        k = max(1, round(self.fraction * count))
        # numpy promises the bits of its generators; and of all orders of N numbers of 64 random
        # bits, ties aside, each is as likely
        key = [seed % _INDEX, _INDEX - 1 - group]
        counter = np.array([0, 0, 0, step % _INDEX], dtype=np.uint64)
        drawn = np.random.Philox(key=np.array(key, np.uint64), counter=counter).random_raw(count)
        first = np.argsort(drawn, kind="stable")[:k]
        return Chosen(tuple(sorted(p for unit in first for p in units[unit])), count / k)

    def _units(self, names: Sequence[str]) -> list[list[int]]:
        found: dict[object, list[int]] = {}
        for position, name in enumerate(names):
            layer = _LAYER.match(name) if self.by == "layer" else None
            found.setdefault(layer.group() if layer else position, []).append(position)
        return list(found.values())

    def described(self) -> Any:
        return self.fraction if self.by == "tensor" else f"Draw({self.fraction}, by={self.by!r})"


@dataclass(frozen=True)
class Cycle(Active):
    """Parts that take turns: each is what its patterns match, for so many steps.

    A step's estimate is of the gradient of its part alone, as in block coordinate descent; nothing
    is scaled. A single part is what moves in all steps. What no part matches never moves.

    Args:
        parts: of each, a pattern or several of parameter names, as ``include`` of
            :func:`hybrid_param_groups` takes them.
        every: steps of each turn, at least 1.

    Raises:
        TypeError, ValueError: an argument that cannot be.

    Example:
        >>> layers = [rf"layers\\.{i}\\." for i in range(model.config.num_hidden_layers)]
        >>> Cycle([*layers, ["embed_tokens", r"model\\.norm"]])
    """

    parts: tuple[tuple[str, ...], ...]
    every: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.parts, str) or not isinstance(self.parts, Iterable):
            raise TypeError(f"parts must be a sequence of patterns, got {self.parts!r}")
        parts = tuple(tuple(patterns_in("parts", part)) for part in self.parts)
        if not parts or not all(parts):
            raise ValueError(f"parts must have patterns each, and be at least one, got {parts!r}")
        every = plain(self.every)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be an int >= 1, got {self.every!r}")
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "every", every)

    @property
    def changes(self) -> bool:  # type: ignore[override]
        return len(self.parts) > 1

    def choose(self, names: Sequence[str], seed: int, step: int, group: int) -> Chosen:
        turn = step // self.every if self.changes else 0  # a step on the device is not read
        return Chosen(_positions(self.parts[turn % len(self.parts)], names), 1.0)

    def ever(self, names: Sequence[str]) -> tuple[int, ...]:
        return _positions([pattern for part in self.parts for pattern in part], names)

    def described(self) -> Any:
        parts = [list(part) for part in self.parts]
        return f"Cycle({parts}, every={self.every})" if self.changes else parts[0]

    def check(self, names: Sequence[Sequence[str]]) -> None:
        every = [name for of_group in names for name in of_group]
        for part in self.parts:
            for pattern in part:
                if not any(matching([pattern], [name]) for name in every):
                    raise ValueError(
                        "active must match names of zeroth-order parameters, got "
                        f"{pattern!r}, which matches none"
                    )


def _positions(patterns: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    return tuple(i for i, name in enumerate(names) if matching(patterns, [name]))


def active_of(value: Any) -> Active | None:
    """What ``active=`` says.

    Raises:
        TypeError, ValueError: it says nothing of the kind.
    """
    value = plain(value)
    if value is None or isinstance(value, Active):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not (0.0 < value <= 1.0 and math.isfinite(value)):
            raise ValueError(f"active must be in (0, 1] where it is a fraction, got {value!r}")
        return Draw(value)
    if isinstance(value, (str, Sequence)):
        found = patterns_in("active", value)
        if not found:
            raise ValueError("active must have at least one pattern, got none")
        return Cycle((tuple(found),))
    raise TypeError(
        "active must be None, a fraction in (0, 1], patterns of parameter names, a Draw or a "
        f"Cycle, got {value!r}"
    )
