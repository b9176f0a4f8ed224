"""Moving the zeroth-order parameters along random directions, and back, whatever happens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from zofo_kernels import Direction, Shift, Weights, perturb_, uninterrupted, update_


@dataclass
class ZOGroup:
    """A zeroth-order parameter group, ready for one step.

    ``weights`` are its parameters, with their places among all zeroth-order parameters, which
    select their noise; ``options`` is the optimizer's own dictionary.
    """

    weights: Weights
    options: dict[str, Any]

    @property
    def params(self) -> list[Tensor]:
        return self.weights.tensors

    @property
    def indices(self) -> list[int]:
        return self.weights.indices

    @property
    def names(self) -> list[str]:
        """Names for messages, one a parameter; numbered where the user gave none."""
        given = self.options.get("param_names")
        if given is None:
            return [
                f"parameter {i} {tuple(p.shape)}"
                for i, p in zip(self.indices, self.params, strict=True)
            ]
        named = {id(p): name for p, name in zip(self.options["params"], given, strict=True)}
        return [named[id(p)] for p in self.params]

    @property
    def mu(self) -> float:
        return float(self.options["mu"])

    def direction(self, sample: int, distribution: str) -> Direction:
        options = self.options
        return Direction(options["seed"], options["zo_step"], sample, distribution)


class Move(NamedTuple):
    """A pass over all ZO groups, to w + scale v of direction ``sample``, a scale for each group.

    Scales are 0 where the pass restored w.
    """

    sample: int
    scales: tuple[float, ...]


class Update(NamedTuple):
    """All that one step did to the weights of one ZO group; enough to do it again.

    ``path`` has the (sample, scale) of the moves since the last update, which starts from where
    they end; streamed perturbation has none. ``coefficients``, shape (samples,), and ``lr``,
    0-dim, are on the device, with the signs and zeros that the update used.
    """

    seed: int
    step: int
    path: tuple[tuple[int, float], ...]
    coefficients: Tensor
    lr: Tensor
    weight_decay: float


class StepListener(Protocol):
    """Learns what an optimizer does to its zeroth-order weights."""

    def stepped(self, updates: Sequence[Update]) -> None:
        """A step has ended; one update a group."""

    def state_loaded(self) -> None:
        """A state dict was loaded."""


def path_of(moves: Sequence[Move], position: int) -> tuple[tuple[int, float], ...]:
    """(sample, scale) of each move of the group at ``position``, since it was added."""
    return tuple((m.sample, m.scales[position]) for m in moves if position < len(m.scales))


class Perturbation(ABC):
    """Evaluations at w + scale v for all groups together, and the update.

    ``move`` chooses the point, ``evaluating`` is entered for each evaluation there; leaving the
    ``with`` block of the object itself restores what is displaced.
    """

    def __init__(
        self,
        groups: Sequence[ZOGroup],
        distribution: str,
        backend: str,
        path: list[Move] | None = None,
    ) -> None:
        self.groups = list(groups)
        self.path = path if path is not None else []
        self._distribution = distribution
        self._backend = backend
        self._carried: list[Shift | None] = [None] * len(groups)

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()

    @abstractmethod
    def move(self, sample: int, sign: int) -> None:
        """Every group to w + sign mu z of direction ``sample``."""

    @abstractmethod
    def restore(self) -> None:
        """Every group back to w."""

    def evaluating(self) -> AbstractContextManager[Any]:
        """What an evaluation at the present point needs around it."""
        return nullcontext()

    def _shift(self, group: ZOGroup, sample: int, sign: int) -> Shift:
        return Shift(group.direction(sample, self._distribution), sign * group.mu)

    def prepare(self, position: int, coefficients: Tensor, lr: Tensor) -> Update:
        """What a step will do to group ``position``, whose weights stay as they are."""
        options = self.groups[position].options
        return Update(
            options["seed"],
            options["zo_step"],
            path_of(self.path, position),
            -coefficients if options["maximize"] else coefficients,
            lr,
            float(options["weight_decay"]),
        )

    def update(self, position: int, update: Update, rounding: str) -> None:
        """Take group ``position`` from wherever it is to its updated weights, in one pass."""
        group = self.groups[position]
        samples = range(update.coefficients.numel())
        with uninterrupted():
            update_(
                group.weights,
                [group.direction(s, self._distribution) for s in samples],
                update.coefficients,
                update.lr,
                weight_decay=update.weight_decay,
                recover=self._carried[position],
                rounding=rounding,
                backend=self._backend,
            )
            self._carried[position] = None


class InPlacePerturbation(Perturbation):
    """The weights themselves move: no memory, three passes over them a two-sided step.

    One pass a move: weights go from one displaced point to the next by recovering first
    (w + mu z -> w -> w - mu z), which keeps 16-bit weights near where they were.
    """

    def move(self, sample: int, sign: int) -> None:
        with uninterrupted():  # all groups take the same path
            self.path.append(Move(sample, tuple(sign * group.mu for group in self.groups)))
            for position, group in enumerate(self.groups):
                self._pass(position, self._shift(group, sample, sign))

    def restore(self) -> None:
        with uninterrupted():  # all groups, before a Ctrl-C is raised
            if any(self._carried):
                self.path.append(Move(0, (0.0,) * len(self.groups)))
            for position, carried in enumerate(self._carried):
                if carried is not None:
                    self._pass(position, None)

    def _pass(self, position: int, shift: Shift | None) -> None:
        group = self.groups[position]
        direction, scale = shift if shift is not None else (None, 0.0)
        with uninterrupted():
            perturb_(
                group.weights,
                direction,
                scale,
                recover=self._carried[position],
                backend=self._backend,
            )
            self._carried[position] = shift
