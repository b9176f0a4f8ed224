"""A first-order optimizer's memory for one tensor, found by a trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from zofo_kernels._torch_compat import tree_leaves

from .memory import LiveBytes


class OptimizerMemory(NamedTuple):
    """Of one tensor, in bytes."""

    state: int
    """What the optimizer keeps for it between steps."""
    workspace: int
    """What a step takes beside, and frees."""


def trial_optimizer(
    factory: Callable[..., Optimizer], parameter: Tensor, options: Mapping[str, Any]
) -> Optimizer:
    """An optimizer of one tensor, which is no weight.

    ``capturable`` is left out but on CUDA, as classes refuse it elsewhere.
    """
    options = dict(options)
    if options.get("capturable") and parameter.device.type != "cuda":
        options["capturable"] = False
        if isinstance(options.get("lr"), Tensor):  # which foreach takes with capturable only
            options["lr"] = float(options["lr"])
    return factory([parameter], **options)


class Trials:
    """Tries steps of an optimizer on tensors like the ones given; no weight is touched.

    On meta, at the tensor's own shape; on the CPU where the class cannot step there.

    Args:
        factory: the optimizer class.
        options: for its constructor.
    """

    def __init__(self, factory: Callable[..., Optimizer], options: Mapping[str, Any]) -> None:
        self._factory = factory
        self._options = dict(options)
        self._known: dict[Any, OptimizerMemory] = {}

    def of(self, parameter: Tensor) -> OptimizerMemory:
        """Memory for this tensor.

        Raises:
            Whatever the class raises for a tensor of zeros of this shape.
        """
        key = (tuple(parameter.shape), parameter.dtype)
        if key not in self._known:
            try:
                self._known[key] = self._try(*key, "meta")
            except (RuntimeError, NotImplementedError, TypeError, ValueError):
                self._known[key] = self._try(*key, "cpu")
        return self._known[key]

    def _try(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> OptimizerMemory:
        p = torch.zeros(shape, dtype=dtype, device=device).requires_grad_()
        optimizer = trial_optimizer(self._factory, p, self._options)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        with LiveBytes() as watch:
            optimizer.step()
        kept = [t for t in tree_leaves(dict(optimizer.state[p])) if isinstance(t, Tensor)]
        storages = {id(s): s.nbytes() for s in [t.untyped_storage() for t in kept]}
        return OptimizerMemory(sum(storages.values()), watch.most - max(0, watch.now))
