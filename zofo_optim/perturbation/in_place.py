"""Perturbation in place: the weights themselves move, and move back."""

from __future__ import annotations

from typing import NamedTuple

from zofo_kernels import Shift, Weights, perturb_, uninterrupted

from ..advice import Advice
from ..listeners import Listener, Move
from ..settings import Settings
from ..zo_groups import ZOGroup
from .base import Perturbation, written


class InPlacePerturbation(Perturbation):
    """No memory, three passes over the weights in a two-sided step.

    One pass a move: weights go from one displaced point to the next by recovering first
    (w + mu v -> w -> w - mu v), which keeps 16-bit weights near where they were.
    """

    def __init__(self, settings: Settings, listener: Listener, advice: Advice) -> None:
        super().__init__(settings, listener, advice)
        self._left: list[_Left] = []

    def over(self, groups: list[ZOGroup]) -> InPlacePerturbation:
        self._take_back()
        super().over(groups)
        return self

    def move(self, sample: int, sign: int) -> None:
        with uninterrupted():  # all groups take the same path
            self.gathered.reshard()
            try:
                self._tell(Move(sample, tuple(sign * group.displacement for group in self.groups)))
            finally:  # what was told happens, though a listener raises
                for position, group in enumerate(self.groups):
                    self._pass(position, self._shift(group, sample, sign))

    def restore(self) -> None:
        if not self._carried:
            return
        with uninterrupted():  # all groups, before a Ctrl-C is raised
            try:
                self.gathered.reshard()
                self._tell(Move(0, (0.0,) * len(self.groups)))
            finally:
                self._restore_each()

    def _restore_each(self) -> None:
        """One that cannot be restored now keeps none of the others from it."""
        failed: BaseException | None = None
        for position, shift in sorted(self._carried.items()):
            try:
                self._pass(position, None)
            except BaseException as error:
                failed = failed or error
                self._left += _Left.of(self.groups[position], shift)
        self._carried.clear()
        if failed is not None:
            raise failed

    def _tell(self, move: Move) -> None:
        self.moves.append(move)
        self._listener.moved(move)

    def _pass(self, position: int, shift: Shift | None) -> None:
        perturb_(
            self.groups[position].weights,
            None if shift is None else shift.direction,
            0.0 if shift is None else shift.scale,
            recover=self._carried.get(position),
            backend=self._settings.backend,
        )
        if shift is None:
            del self._carried[position]
        else:
            self._carried[position] = shift

    def _take_back(self) -> None:
        """Restore what an earlier step could not, where nobody has written to it since."""
        if not self._left:
            return
        with uninterrupted():
            self.gathered.reshard()
            while self._left:
                left = self._left[-1]
                if left.is_untouched():
                    perturb_(
                        left.weights,
                        None,
                        0.0,
                        recover=left.shift,
                        backend=self._settings.backend,
                    )
                self._left.pop()


class _Left(NamedTuple):
    """A weight that a failed pass left displaced, as it was then."""

    weights: Weights
    shift: Shift
    address: int
    version: int

    @classmethod
    def of(cls, group: ZOGroup, shift: Shift) -> list[_Left]:
        return [cls(one, shift, *written(*one.tensors)) for one in group.weights.singly()]

    def is_untouched(self) -> bool:
        return written(*self.weights.tensors) == (self.address, self.version)
