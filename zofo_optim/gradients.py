"""First-order gradients over the runs of one estimate: which of them count, and by how much."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Gradients:
    """Those of the first run that takes them, as it leaves them, and of others by their weights.

    While other runs go on ``.grad`` is set aside, so that nothing a closure does can change or
    clear it.

    Args:
        parameters: the first-order ones.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._aside: list[Tensor | None] | None = None
        self._taken = False

    def before_run(self, weight: float) -> None:
        """Make room for a run whose gradients have this weight, 0 for none."""
        if weight and not self._taken:
            return
        if self._aside is None:
            self._aside = [p.grad for p in self._parameters]
        for p in self._parameters:
            if p.grad is not None:  # then, or left by the run before
                p.grad = None

    def after_run(self, weight: float, loss: Tensor) -> None:
        """Add what it left; nothing where its loss, or one of its examples', is not finite."""
        if not weight:
            return
        if not self._taken:
            self._taken = True
            return
        assert self._aside is not None
        healthy = loss.isfinite().all()
        if loss.device.type == "cpu" and not healthy:
            return
        with torch.no_grad():
            for place, p in enumerate(self._parameters):
                if p.grad is not None:
                    self._aside[place] = _sum(self._aside[place], weight, p.grad, healthy)

    def put_back(self) -> None:
        """After the last run."""
        if self._aside is not None:
            for p, gradient in zip(self._parameters, self._aside, strict=True):
                p.grad = gradient


def _sum(kept: Tensor | None, weight: float, gradient: Tensor, healthy: Tensor) -> Tensor:
    """kept + weight gradient, in place; on a device that is not asked, gradient or 0."""
    gradient = gradient.detach()
    if healthy.device.type != "cpu":
        values = gradient._values() if gradient.is_sparse else gradient  # type: ignore[no-untyped-call]
        values.masked_fill_(~healthy.to(values.device, non_blocking=True), 0.0)
    if kept is None:
        return gradient.mul_(weight)
    if kept.is_sparse and not gradient.is_sparse:
        return gradient.mul_(weight).add_(kept)
    return kept.add_(gradient, alpha=weight)
