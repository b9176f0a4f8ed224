"""What a step does to the weights of one group."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from zofo_kernels import Direction


class Update(NamedTuple):
    """w <- w - lr (sum_s c_s v_s + weight_decay w) for one group; enough to do it again."""

    directions: tuple[Direction, ...]
    """v_s: the group's own, samples 0 to num_samples - 1 in order; journals record their
    coefficients alone."""
    coefficients: Tensor
    """c_s after ``zo_rule``, shape (directions,), on the device, with the signs and zeros that the
    update used."""
    lr: Tensor
    """0-dim, on the device; 0 where the estimate said nothing."""
    weight_decay: float
    active: tuple[int, ...] | None = None
    """Positions of the parameters that it was done to, among the group's; None: all."""

    def frozen(self) -> Update:
        """The same, to be kept: with ``capturable=True`` directions hold the living counter."""
        return self._replace(
            directions=tuple(
                d._replace(step=d.step.clone()) if isinstance(d.step, Tensor) else d
                for d in self.directions
            )
        )
