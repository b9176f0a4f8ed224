"""Zeroth-order gradient estimators as patterns of loss evaluations.

Both average over ``num_samples`` directions v (Ma, Yu, Huang 2026, section 3 and Lemma B.5):

- one-sided:  [f(x + mu v) - f(x)] / mu * v, error O(mu), one extra evaluation a direction;
- two-sided:  [f(x + mu v) - f(x - mu v)] / (2 mu) * v, error O(mu^2), two of them.

Where groups differ in mu, all move together along D v with D = diag(mu); dividing the same loss
difference by a group's own mu is unbiased for that group, since v has identity covariance.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Estimator(NamedTuple):
    """Where the loss is evaluated for one direction."""

    signs: tuple[int, ...]
    """Multiples of mu v at which the perturbed loss is taken, in order."""
    needs_clean: bool
    """Whether f(x) itself enters the estimate."""

    def slope(self, perturbed: list[Tensor], clean: Tensor | None) -> Tensor:
        """The loss difference per unit of mu along one direction; 0-dim.

        Args:
            perturbed: the loss at each of ``signs``, 0-dim.
            clean: f(x), 0-dim; used where ``needs_clean``.
        """
        if self.needs_clean:
            assert clean is not None
            return perturbed[0] - clean
        return (perturbed[0] - perturbed[1]) / 2


ESTIMATORS = {
    "one_sided": Estimator(signs=(1,), needs_clean=True),
    "two_sided": Estimator(signs=(1, -1), needs_clean=False),
}
