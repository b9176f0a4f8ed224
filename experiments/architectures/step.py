"""One step of HybridZOFO on a copy of a model."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from zofo_optim import HybridZOFO, hybrid_param_groups

from .batches import Batch
from .building import loss_of

MU, LR, SEED = 2.0**-9, 2.0**-12, 5


class Step:
    """A step of a copy of the model, and what it saw.

    Args:
        model: is copied.
        batch: of the loss.
        options: of the optimizer.
    """

    def __init__(self, model: Any, batch: Batch, **options: Any) -> None:
        self.model, self.batch = copy.deepcopy(model), batch
        self.before = contents(self.model)
        self.seen: list[Tensor] = []
        lr = options.pop("lr", LR)
        fo = [p for p in self.model.parameters() if p.requires_grad]
        groups = hybrid_param_groups(
            self.model,
            zo=dict(lr=lr, mu=MU),
            fo=dict(lr=LR) if fo else None,
            verbose=False,
        )
        options = {"distribution": "rademacher", "seed": SEED, **options}
        self.optimizer = HybridZOFO(groups, **options)
        self.clean = bool(fo)
        seed_all()
        self.optimizer.backward(self._closure)
        self.unmoved = same(self.before, contents(self.model))
        self.gradients = [p.grad.clone() for p in fo if p.grad is not None]
        self.optimizer.step()

    def _closure(self) -> Tensor:
        loss = loss_of(self.model, self.batch)
        self.seen.append(loss.detach().clone())
        return loss

    @property
    def losses(self) -> Tensor:
        """At the perturbed points: plus, minus."""
        plus = self.seen[1 if self.clean else 0]
        return torch.stack([plus, self.seen[-1]]).double()

    @property
    def slope(self) -> float:
        slopes = self.optimizer.projected_grads
        assert slopes is not None  # since a step was made
        return float(slopes.reshape(-1)[0])


def contents(model: Any) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """To the bit, also where a weight is no number."""
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        if x.numel() and x.dim()
        else torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


def seed_all() -> None:
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002  # what models mask by
    torch.manual_seed(0)
