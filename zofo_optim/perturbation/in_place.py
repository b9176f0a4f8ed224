"""Perturbation in place: the weights themselves move, and move back."""

from __future__ import annotations

from zofo_kernels import Shift, perturb_, uninterrupted

from ..listeners import Move
from .base import Perturbation


class InPlacePerturbation(Perturbation):
    """No memory, three passes over the weights in a two-sided step.

    One pass a move: weights go from one displaced point to the next by recovering first
    (w + mu v -> w -> w - mu v), which keeps 16-bit weights near where they were.
    """

    def move(self, sample: int, sign: int) -> None:
        with uninterrupted():  # all groups take the same path
            try:
                self._tell(Move(sample, tuple(sign * group.mu for group in self.groups)))
            finally:  # what was told happens, though a listener raises
                for position, group in enumerate(self.groups):
                    self._pass(position, self._shift(group, sample, sign))

    def restore(self) -> None:
        if not self._carried:
            return
        with uninterrupted():  # all groups, before a Ctrl-C is raised
            try:
                self._tell(Move(0, (0.0,) * len(self.groups)))
            finally:
                for position in sorted(self._carried):
                    self._pass(position, None)

    def _tell(self, move: Move) -> None:
        self.moves.append(move)
        self._listener.moved(move)

    def _pass(self, position: int, shift: Shift | None) -> None:
        direction, scale = shift if shift is not None else (None, 0.0)
        perturb_(
            self.groups[position].weights,
            direction,
            scale,
            recover=self._carried.get(position),
            backend=self._settings.backend,
        )
        if shift is None:
            del self._carried[position]
        else:
            self._carried[position] = shift
