"""What every perturbation does: visit points with a closure, restore, apply updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor

from zofo_kernels import Shift, uninterrupted, update_

from ..advice import Advice
from ..estimators import Point
from ..evaluation import Evaluation
from ..listeners import Listener, Move
from ..rules import Update
from ..settings import Settings
from ..zo_groups import Tables, ZOGroup

Evaluate = Callable[[bool], Evaluation]
"""Runs the closure once: with gradients, or without."""


class Perturbation(ABC):
    """Evaluations at x + sign mu v for all groups together, and the update. One an optimizer.

    A step is ``with perturbation.over(groups): visit, update``; leaving the block restores
    what is displaced, whatever happened in it.

    Args:
        settings: the optimizer's.
        listener: told of each move before it is made.
        advice: says once what is wrong with a closure.
    """

    def __init__(self, settings: Settings, listener: Listener, advice: Advice) -> None:
        self.groups: list[ZOGroup] = []
        """The ZO groups of the present step."""
        self.moves: list[Move] = []
        """Since the last update; moves round, so weights depend on them."""
        self._settings = settings
        self._listener = listener
        self._advice = advice
        self._tables = Tables()
        self._carried: dict[int, Shift] = {}  # by the group's position, within a step

    def groups_of(self, param_groups: Iterable[dict[str, Any]]) -> list[ZOGroup]:
        """The zeroth-order ones, with their tables of addresses kept from step to step."""
        return self._tables.groups(param_groups)

    def over(self, groups: list[ZOGroup]) -> Perturbation:
        """Work on these groups from now on."""
        self.groups = groups
        return self

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()

    def visit(self, points: Sequence[Point], evaluate: Evaluate) -> list[Evaluation]:
        """Evaluate at each point in turn. The weights then stay at the last one."""
        found = []
        for point in points:
            if point.sign:
                self.move(point.sample, point.sign)
            else:
                self.restore()
            found.append(self._evaluate_here(point, evaluate))
        return found

    def _evaluate_here(self, point: Point, evaluate: Evaluate) -> Evaluation:
        return evaluate(point.gradient)

    @abstractmethod
    def move(self, sample: int, sign: int) -> None:
        """Every group to w + sign mu v of direction ``sample``."""

    @abstractmethod
    def restore(self) -> None:
        """Every group back to w; where they are, nothing happens."""

    def update(self, updates: Sequence[Update]) -> None:
        """Take each group from wherever it is to its updated weights, one pass a group."""
        with uninterrupted():
            for position, update in enumerate(updates):
                update_(
                    self.groups[position].weights,
                    update.directions,
                    update.coefficients,
                    update.lr,
                    weight_decay=update.weight_decay,
                    recover=self._carried.get(position),
                    rounding=self._settings.rounding,
                    backend=self._settings.backend,
                )
                self._carried.pop(position, None)
            self.moves.clear()

    def _shift(self, group: ZOGroup, sample: int, sign: int) -> Shift:
        return Shift(group.direction(sample, self._settings.distribution), sign * group.mu)


def written(tensor: Tensor) -> tuple[int, int]:
    """Changes when someone writes to the tensor; those of inference mode count no versions."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
