"""Update rules: from the coefficients of a step to what it does to the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from zofo_kernels import Direction

from .zo_groups import ZOGroup


class Update(NamedTuple):
    """w <- w - lr (sum_s c_s v_s + weight_decay w) for one group; enough to do it again."""

    directions: tuple[Direction, ...]
    """v_s."""
    coefficients: Tensor
    """c_s, shape (directions,), on the device, with the signs and zeros that the update used."""
    lr: Tensor
    """0-dim, on the device; 0 where the estimate said nothing."""
    weight_decay: float

    def frozen(self) -> Update:
        """The same, to be kept: with ``capturable=True`` directions hold the living counter."""
        return self._replace(
            directions=tuple(
                d._replace(step=d.step.clone()) if isinstance(d.step, Tensor) else d
                for d in self.directions
            )
        )


Rule = Callable[[ZOGroup, Tensor, Tensor], Update]
"""A rule takes the group, the coefficients of this step's
directions, shape (num_samples,), and the learning rate, 0-dim; both tensors are on the device,
and a rule does not wait for it. It changes nothing: the update is applied, or not, by others.
Directions are the group's own, samples 0 to num_samples - 1 in order: a journal records no more
than their coefficients."""


def sgd(group: ZOGroup, coefficients: Tensor, lr: Tensor) -> Update:
    """Gradient descent along the estimate (Ma, Yu, Huang 2026, Algorithm 1)."""
    options = group.options
    return Update(
        tuple(group.direction(s) for s in range(coefficients.numel())),
        -coefficients if options["maximize"] else coefficients,
        lr,
        float(options["weight_decay"]),
    )


RULES: dict[str, Rule] = {"sgd": sgd}
