"""The baseline: MeZO's in-place perturbation and update (Malladi et al. 2023, Algorithm 1).

Written from the paper, with the operations of its published recipe: the noise of all parameters
is drawn again on every pass from torch's generator, seeded once a pass, parameter by parameter.
The noise is Gaussian, whatever it is compared with. Each pass allocates temporaries as large as
a parameter; beyond some ten million elements a parameter, the C library takes them fresh from
the system every time, so that page faults are a large part of the recipe's time there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _normal(p: Tensor) -> Tensor:
    return torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)


def perturb(parameters: Sequence[Tensor], eps: float, seed: int, scaling_factor: float) -> None:
    """w <- w + scaling_factor z eps."""
    torch.manual_seed(seed)
    for p in parameters:
        z = _normal(p)
        p.data = p.data + scaling_factor * z * eps


def update(
    parameters: Sequence[Tensor],
    projected_grad: float,
    lr: float,
    seed: int,
    weight_decay: float = 0.0,
) -> None:
    """w <- w - lr (projected_grad z + weight_decay w)."""
    torch.manual_seed(seed)
    for p in parameters:
        z = _normal(p)
        p.data = p.data - lr * (projected_grad * z + weight_decay * p.data)


class MeZO:
    """The published step: +1, loss, -2, loss, +1, update; the seed is new in every step."""

    def __init__(
        self, parameters: Sequence[Tensor], closure: Callable[[], Tensor], *, lr: float, eps: float
    ) -> None:
        self.parameters = list(parameters)
        self.closure = closure
        self.lr = lr
        self.eps = eps
        self.seed = 0
        self.projected_grad = 0.0

    @torch.no_grad()
    def step(self) -> Tensor:
        self.seed += 1
        perturb(self.parameters, self.eps, self.seed, 1)
        loss1 = self.closure()
        perturb(self.parameters, self.eps, self.seed, -2)
        loss2 = self.closure()
        self.projected_grad = ((loss1 - loss2) / (2 * self.eps)).item()
        perturb(self.parameters, self.eps, self.seed, 1)
        update(self.parameters, self.projected_grad, self.lr, self.seed)
        return loss1
