"""Zeroth-order gradient estimators: where the loss is asked for, and what its values say.

Both average over ``num_samples`` directions v (Ma, Yu, Huang 2026, section 3 and Lemma B.5):

- one-sided:  [f(x + mu v) - f(x)] / mu * v, error O(mu), one extra evaluation a direction;
- two-sided:  [f(x + mu v) - f(x - mu v)] / (2 mu) * v, error O(mu^2), two of them;
- antithetic: the two-sided one from one evaluation, where examples have directions of their own:
  half of a direction's examples are at x + mu v, and as many at x - mu v.

An estimator is pure: settings in, points out; losses in, differences out. What visits the points
does not know its name.

Where groups differ in mu, all move together along D v with D = diag(mu); dividing the same loss
difference by a group's own mu is unbiased for that group, since v has identity covariance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Point(NamedTuple):
    """Where one evaluation asks for the loss: x + sign mu v of a sample, for the whole batch.

    With one direction an example, each example has its own v.
    """

    sample: int
    """Which direction v; of no account where ``sign`` is 0."""
    sign: int
    """Multiple of mu v; 0 is the unperturbed point, the clean one."""
    gradient: float = 0.0
    """Weight of the loss here in what first-order parameters descend; 0: no gradients are taken."""


class Estimator(NamedTuple):
    """The points of one direction, and whether f(x) itself is needed."""

    signs: tuple[int, ...]
    """Multiples of mu v at which the perturbed loss is taken, in order."""
    needs_clean: bool
    """Whether f(x) itself enters the estimate."""
    sides: int = 1
    """Displacements along a direction that one evaluation has: 2 where examples are in pairs."""

    def points(self, num_samples: int, *, first_order: bool, coupling: float = 0.0) -> list[Point]:
        """One point an evaluation, in order; the clean one comes first, where there is one.

        Args:
            num_samples: directions; 0 where nothing is zeroth-order.
            first_order: whether there are first-order parameters, which need a gradient.
            coupling: weight of the mean of the displaced losses beside the clean one, in what
                these descend (Jin and Tan 2026, section 2).
        """
        clean = first_order or self.needs_clean or num_samples == 0
        displaced = num_samples * len(self.signs)
        weight = coupling / displaced if first_order and displaced else 0.0
        return [Point(0, 0, gradient=float(first_order))] * clean + [
            Point(sample, sign, weight) for sample in range(num_samples) for sign in self.signs
        ]

    def differences(self, points: Sequence[Point], losses: Tensor, each: int = 1) -> Tensor:
        """The difference of losses per unit of mu along each direction, shape (num_samples,).

        Args:
            points: what :meth:`points` gave.
            losses: there, shape (points,); or of B examples, shape (points, B).
            each: with losses of examples: how many of them, one after the other, are displaced
                alike.

        Returns:
            With losses of examples, a difference for each direction, in order: the mean over its
            examples, or pairs of examples, whose losses are finite; NaN where none are.
        """
        has_clean = points[0].sign == 0
        displaced = losses[int(has_clean) :]
        if self.sides == 2:
            sides = displaced[0].view(-1, 2, each)
            found = (sides[:, 0] - sides[:, 1]) / 2
        else:
            perturbed = displaced.reshape(-1, len(self.signs), *displaced.shape[1:])
            base = losses[0] if self.needs_clean else perturbed[:, 1]
            found = perturbed[:, 0] - base
            if not self.needs_clean:
                found = found / 2
        if losses.dim() == 1:
            return found
        found = found.reshape(-1, each)
        if has_clean:
            healthy = losses[0].isfinite().view(-1, self.sides, each).all(1)
            found = torch.where(healthy, found, math.nan)
        if each == 1:
            return found[:, 0]
        finite = found.isfinite()
        return torch.where(finite, found, 0.0).sum(1) / finite.sum(1)


ESTIMATORS = {
    "one_sided": Estimator(signs=(1,), needs_clean=True),
    "two_sided": Estimator(signs=(1, -1), needs_clean=False),
    "antithetic": Estimator(signs=(1,), needs_clean=False, sides=2),
}
