"""Zeroth-order gradient estimators: where the loss is asked for, and what its values say.

Both average over ``num_samples`` directions v (Ma, Yu, Huang 2026, section 3 and Lemma B.5):

- one-sided:  [f(x + mu v) - f(x)] / mu * v, error O(mu), one extra evaluation a direction;
- two-sided:  [f(x + mu v) - f(x - mu v)] / (2 mu) * v, error O(mu^2), two of them.

An estimator is pure: settings in, points out; losses in, differences out. What visits the points
does not know its name.

Where groups differ in mu, all move together along D v with D = diag(mu); dividing the same loss
difference by a group's own mu is unbiased for that group, since v has identity covariance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Point(NamedTuple):
    """Where one evaluation asks for the loss: x + sign mu v of a sample, for the whole batch.

    With one direction an example, each example has its own v.
    """

    sample: int
    """Which direction v; of no account where ``sign`` is 0."""
    sign: int
    """Multiple of mu v; 0 is the unperturbed point, the clean one."""
    gradient: bool = False
    """Whether the evaluation leaves first-order gradients too."""


class Estimator(NamedTuple):
    """The points of one direction, and whether f(x) itself is needed."""

    signs: tuple[int, ...]
    """Multiples of mu v at which the perturbed loss is taken, in order."""
    needs_clean: bool
    """Whether f(x) itself enters the estimate."""

    def points(self, num_samples: int, *, first_order: bool) -> list[Point]:
        """One point an evaluation, in order; the clean one comes first, where there is one.

        Args:
            num_samples: directions; 0 where nothing is zeroth-order.
            first_order: whether there are first-order parameters, which need a gradient.
        """
        clean = first_order or self.needs_clean or num_samples == 0
        return [Point(0, 0, gradient=first_order)] * clean + [
            Point(sample, sign) for sample in range(num_samples) for sign in self.signs
        ]

    def differences(self, points: Sequence[Point], losses: Tensor) -> Tensor:
        """The difference of losses per unit of mu along each direction, shape (num_samples,).

        Args:
            points: what :meth:`points` gave.
            losses: there, shape (points,); or of B examples, shape (points, B), each of which has
                directions of its own: then B differences for each sample, in order.
        """
        has_clean = points[0].sign == 0
        displaced = losses[int(has_clean) :]
        perturbed = displaced.reshape(-1, len(self.signs), *displaced.shape[1:])
        if self.needs_clean:
            return (perturbed[:, 0] - losses[0]).flatten()
        return ((perturbed[:, 0] - perturbed[:, 1]) / 2).flatten()


ESTIMATORS = {
    "one_sided": Estimator(signs=(1,), needs_clean=True),
    "two_sided": Estimator(signs=(1, -1), needs_clean=False),
}
