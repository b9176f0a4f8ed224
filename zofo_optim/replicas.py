"""Who evaluates which points, and how their losses come together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .estimators import Point


class Replicas(Protocol):
    """The processes that train one model together.

    Every process holds the same zeroth-order weights and draws the same directions, so a few
    scalars are all that they exchange. Each method is called by all processes, in the same order,
    in every estimate with zeroth-order groups.
    """

    def mine(self, points: Sequence[Point]) -> Sequence[Point]:
        """Those of a step's points that this process evaluates, in order; at least one.

        The unperturbed point is among them, where the step has it: every process needs its own
        first-order gradients, and returns its own loss.
        """

    def gather(self, losses: Tensor) -> Tensor:
        """The losses at all points of the step, the same in every process.

        Args:
            losses: at ``mine(points)``, shape (own points,), on the loss's device.

        Returns:
            Shape (points,), in the points' order; where processes evaluate one point on parts of
            a batch, the mean over these.
        """


class OneProcess:
    """One process evaluates everything."""

    def mine(self, points: Sequence[Point]) -> Sequence[Point]:
        return points

    def gather(self, losses: Tensor) -> Tensor:
        return losses
