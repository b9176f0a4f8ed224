"""What a person logs of a training, kept where the loss is and read without making it wait."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zofo_kernels.memory import to_device

from .advice import Advice
from .capture import counters
from .listeners import Estimated, Listener
from .update import Update
from .zo_groups import ZOGroup

FLAT_STEPS = 5
"""Estimates in a row with bit-identical losses before a warning."""
SKIPPED_STEPS = 20
"""Estimates in a row that were skipped before a warning."""
HUGE = 1e4
"""A loss of this size is rarely that of a model that learns."""
_RATES = "the learning rate of a zeroth-order group is usually 1e-7 to 1e-4"


class Monitor(Listener):
    """Keeps the last loss, slopes and updates; counts skipped estimates and flat ones.

    Losses and slopes are kept of the last estimate, and summed over the micro-batches of a step.
    """

    def __init__(self, advice: Advice) -> None:
        self._advice = advice
        self._counts: Tensor | None = None  # int64 (3,): skipped, flat in a row, skipped in a row
        self._mirror: Tensor | None = None  # the same on the host, possibly a step late
        self._forget()

    def _forget(self) -> None:
        self.loss: Tensor | None = None
        """See :attr:`HybridZOFO.last_loss`."""
        self.slopes: Tensor | None = None
        """See :attr:`HybridZOFO.projected_grads`."""
        self._total: tuple[Tensor | None, Tensor | None] = (None, None)  # loss and slopes, summed
        self._parts = 1  # of a step, whose examples have slopes of their own
        self._updates: Sequence[Update] = ()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_advice", "_counts", "_mirror")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def skipped(self) -> int:
        """Number of estimates with a non-finite slope. Reading it waits for the device."""
        return 0 if self._counts is None else int(self._counts[0])

    def add(
        self,
        loss: Tensor,
        slopes: Tensor | None,
        accumulates: bool,
        per_example: bool = False,
    ) -> None:
        """An estimate was taken; ``accumulates`` where the step's first one came before it.

        Slopes add up along the same directions. Those of examples stand side by side, each of a
        loss that was divided by the number of micro-batches.
        """
        before = self._total if accumulates else (None, None)
        self.loss, self.slopes = loss, slopes
        put_together = _joined if per_example else _sum
        self._total = _sum(before[0], loss), put_together(before[1], slopes)
        self._parts = self._parts + 1 if accumulates and per_example else 1

    def estimated(self, estimated: Estimated) -> None:
        flat = (estimated.losses == estimated.losses[0]).all() & estimated.finite
        flat = flat & (estimated.slopes == 0).all()  # a single evaluation has both sides
        skipped = ~estimated.finite
        device = flat.device
        if self._counts is None or self._mirror is None or self._counts.device != device:
            old = self._counts
            self._counts = counters(3, device=device)
            if old is not None:
                self._counts.copy_(old)
            self._mirror = counters(3, device="cpu", pin_memory=device.type == "cuda")
        nothing = skipped & (estimated.slopes == 0).all()
        seen = torch.stack((skipped, flat, nothing)).to(torch.int64)
        self._counts.add_(seen)
        self._counts[1:].mul_(seen[1:])
        self._mirror.copy_(self._counts, non_blocking=True)

    def updated(self, updates: Sequence[Update]) -> None:
        self._updates = updates

    def state_loaded(self) -> None:
        self._forget()  # they are of the path that was left

    def warn(self, names: Callable[[], list[str]]) -> None:
        """Warn, once each, of steps in a row that can teach the parameters ``names()`` nothing."""
        if self._mirror is None or not self._mirror[1:].any():
            return
        _, flat, skipped = self._mirror.tolist()
        if flat >= FLAT_STEPS:
            self._advice.once("flat", lambda: self._of_flat_losses(names()))
        if skipped >= SKIPPED_STEPS:
            self._advice.once(
                "never finite",
                f"no loss was finite for {SKIPPED_STEPS} steps, so nothing is learned: training "
                f"has diverged ({_RATES}), a batch is broken, or a 16-bit forward pass overflows",
            )

    def _of_flat_losses(self, names: list[str]) -> str:
        """Waits for the device, so it is called once."""
        size = 0.0 if self.loss is None else abs(self.loss.item())
        diverged = ""
        if size >= HUGE:
            diverged = (
                f"at {size:.1e} its spacing hides what a perturbation changes, as training has "
                f"diverged ({_RATES}) or the loss is a sum where a mean is meant; or else "
            )
        return (
            f"the loss was bit-identical under perturbation for {FLAT_STEPS} steps: {diverged}the "
            "zeroth-order parameters do not reach the loss (an unused module, a closure that "
            "does not run the model, or runs another copy of it, a loss or score that is "
            "constant), or mu is too small for the spacing of the weights or of a 16-bit loss. "
            "Parameters: " + ", ".join(names)
        )

    def report(self, groups: Sequence[ZOGroup]) -> str:
        """See :meth:`HybridZOFO.report`."""
        parts = []
        loss, slopes = self._total
        if loss is not None:
            parts.append(f"loss {loss.item():.4f}")
        if slopes is not None:
            parts.append(f"slope {self._parts * slopes.abs().mean().item():.2e}")
        if self._updates:
            size = relative_size(self._updates, groups)
            parts.append(f"update {size:.1e} of the weights' norm")
        if groups:
            parts.append(f"skipped {self.skipped}")
        start = f"step {int(groups[0].options['zo_step'])}: " if groups else ""
        return start + (", ".join(parts) or "nothing estimated yet")


def relative_size(updates: Sequence[Update], groups: Sequence[ZOGroup]) -> float:
    """||update|| / ||weights|| over all ZO groups. Waits for the device; reads the weights once.

    Of sharded ones it is that of the shards here, which takes no other process.

    Directions have d independent elements of variance 1, so an update's norm is close to
    lr sqrt(d sum_s c_s^2); weight decay is left out.
    """
    moved = weights = 0.0
    for update, group in zip(updates, groups, strict=False):
        moving = range(len(group.params)) if update.active is None else update.active
        held = group.placed.locals
        count = sum(held[position].numel() for position in moving)
        step = float(update.lr) ** 2 * float(update.coefficients.double().square().sum())
        moved += count * step
        # fp32 accumulates the squares of 16-bit weights
        norms = (torch.linalg.vector_norm(p.detach(), dtype=_wide(p)) for p in held)
        weights += sum(float(norm) ** 2 for norm in norms)
    return math.sqrt(moved / weights) if weights else math.inf if moved else 0.0


def _sum(before: Tensor | None, now: Tensor | None) -> Tensor | None:
    if before is None or now is None:
        return before if now is None else now
    return before + to_device(now, before.device)


def _joined(before: Tensor | None, now: Tensor | None) -> Tensor | None:
    if before is None or now is None:
        return before if now is None else now
    return torch.cat([to_device(before, now.device), now], dim=1)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
