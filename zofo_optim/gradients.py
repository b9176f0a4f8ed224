"""First-order gradients over the runs of one estimate: which of them count, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zofo_kernels.memory import to_device

from .replicas import Replicas


class Gradients:
    """Those of the first run that takes them, as it leaves them, and of others by their weights.

    While other runs go on ``.grad`` is set aside, so that nothing a closure does can change or
    clear it.

    Args:
        parameters: the first-order ones.
        replicas: the processes whose gradients are averaged; None for one alone.
        in_buckets: asked after the first run, whether gradients may be where DDP writes those of
            each backward.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        replicas: Replicas | None = None,
        in_buckets: Callable[[], bool] = lambda: False,
    ) -> None:
        self._parameters, self._replicas = parameters, replicas
        self._in_buckets = in_buckets
        self._aside: list[Tensor | None] | None = None
        self._sums: list[Tensor | None] | None = None
        self._taken = False

    def before_run(self, weight: float) -> None:
        """Make room for a run whose gradients have this weight, 0 for none."""
        if weight and not self._taken:
            return
        if self._aside is None:
            self._aside = [p.grad for p in self._parameters]
        if weight and self._sums is None:
            copied = self._in_buckets()
            self._sums = [
                g.detach().clone() if copied and g is not None else g for g in self._aside
            ]
        for p in self._parameters:
            if p.grad is not None:  # then, or left by the run before
                p.grad = None

    def after_run(self, weight: float, loss: Tensor) -> None:
        """Add what it left; nothing where its loss, or one of its examples', is not finite.

        That of any process: the gradients that each has are their mean.
        """
        if not weight:
            return
        if not self._taken:
            self._taken = True
            return
        assert self._sums is not None
        healthy = loss.isfinite().all()
        if self._replicas is not None and self._parameters:
            healthy = self._replicas.all_set(healthy)
        if loss.device.type == "cpu" and not healthy:
            return
        with torch.no_grad():
            for place, p in enumerate(self._parameters):
                if p.grad is not None:
                    self._sums[place] = _sum(self._sums[place], weight, p.grad, healthy)

    def put_back(self) -> None:
        """After the last run."""
        if self._aside is None:
            return
        sums = self._sums or self._aside
        for p, gradient, total in zip(self._parameters, self._aside, sums, strict=True):
            p.grad = gradient if gradient is total else _filled(gradient, total)


def _sum(kept: Tensor | None, weight: float, gradient: Tensor, healthy: Tensor) -> Tensor:
    """kept + weight gradient, kept in place; on a device that is not asked, gradient or 0."""
    gradient = gradient.detach()
    if healthy.device.type != "cpu":
        values = gradient._values() if gradient.is_sparse else gradient  # type: ignore[no-untyped-call]
        values.masked_fill_(~to_device(healthy, values.device), 0.0)
    if kept is None:
        return gradient * weight
    if kept.is_sparse and not gradient.is_sparse:
        return (gradient * weight).add_(kept)
    return kept.add_(gradient, alpha=weight)


@torch.no_grad()
def _filled(gradient: Tensor | None, total: Tensor | None) -> Tensor | None:
    """The total, in the gradient's own memory where it has one."""
    if gradient is None or total is None or gradient.is_sparse:
        return total
    return gradient.copy_(total)
