"""What backward(closure) leaves for step(): coefficients, and whether the losses were finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zofo_kernels.memory import to_device

from .listeners import Estimated
from .rule_states import shaped
from .rules import Rule, State
from .update import Update
from .zo_groups import ZOGroup


@dataclass
class Accumulation:
    """Holds what accumulates. Wrappers that imitate the optimizer's class share this object."""

    estimate: Estimate | None = None


@dataclass(frozen=True)
class Estimate:
    """Sums over the accumulated micro-batches; every tensor stays on the loss's device.

    Without fields it is the estimate of first-order groups alone, whose gradients are in ``.grad``.
    """

    coefficients: Tensor | None = None
    """Shape (ZO groups, samples); None with FO groups only."""
    usable: Tensor | None = None
    """0-dim bool: some coefficient of some micro-batch was finite."""
    clean: Tensor | None = None
    """0-dim bool: every clean loss was finite; None where none was taken with ZO groups."""
    per_example: bool = False
    """Each micro-batch has directions of its own, of its examples: coefficients do not add up."""

    @classmethod
    def of(
        cls,
        losses: Tensor,
        differences: Tensor,
        groups: Sequence[ZOGroup],
        *,
        has_clean: bool,
        nonfinite: str,
    ) -> tuple[Estimate, Estimated]:
        """From the losses of one batch: slopes, then coefficients; and what listeners are told.

        A slope that is not finite becomes 0. A clean loss that is not finite voids all of them, or
        that of its example.

        Args:
            losses: of all evaluations, shape (evaluations,), the clean one first; or of B examples,
                shape (evaluations, B).
            differences: per unit of mu, shape (directions,).
            groups: as they moved.
            has_clean: whether a clean loss was taken.
            nonfinite: "skip" or "raise".

        Raises:
            FloatingPointError: ``nonfinite="raise"``, and a slope is not finite.
        """
        slopes = torch.stack([differences / group.mu for group in groups])
        finite = slopes.isfinite()
        clean = losses[0].isfinite().all() if has_clean else None
        if clean is not None and losses.dim() == 1:  # those of examples are in their differences
            finite = finite & clean
        healthy = finite.all() & losses.isfinite().all()
        if nonfinite == "raise" and not healthy:
            raise FloatingPointError(
                f"closure must return finite losses (nonfinite='raise'), got {losses.tolist()}"
                + (", the unperturbed one first" if has_clean else ", all perturbed")
            )
        slopes = torch.where(finite, slopes, 0.0)
        loss = losses[0].mean() if has_clean else losses.mean()
        told = Estimated(loss, losses, slopes, healthy)
        per_example = losses.dim() > 1
        coefficients = slopes / differences.numel()
        if any(group.scale != 1.0 for group in groups):
            coefficients = torch.stack(
                [row * group.scale for row, group in zip(coefficients, groups, strict=True)]
            )
        return cls(coefficients, finite.any(), clean, per_example), told

    def __add__(self, other: Estimate) -> Estimate:
        """This micro-batch's and another one's: along the same directions, or those that follow.

        Raises:
            ValueError: they are of other groups or samples.
        """
        if self.coefficients is None or self.usable is None:
            return other
        if other.coefficients is None or other.usable is None:
            return self
        theirs, device = other.coefficients, other.coefficients.device
        ours = to_device(self.coefficients, device)  # losses may come from several devices
        fit = len(ours) == len(theirs) if self.per_example else ours.shape == theirs.shape
        if not fit or self.per_example != other.per_example:
            raise ValueError(
                "accumulated estimates must have the same groups and samples, got shape "
                f"{tuple(theirs.shape)} after {tuple(ours.shape)}; call "
                "step() or zero_grad() before adding a parameter group"
            )
        clean = [to_device(e.clean, device) for e in (self, other) if e.clean is not None]
        return Estimate(
            torch.cat([ours, theirs], dim=1) if self.per_example else ours + theirs,
            to_device(self.usable, device) | other.usable,
            clean[0] & clean[-1] if clean else None,
            self.per_example,
        )

    def updates(self, groups: Sequence[ZOGroup], rule: Rule) -> tuple[list[Update], list[State]]:
        """What the step will do, one a group; a group that was added since is left out.

        Returns:
            The updates, and what the rule remembers once they are applied.
        """
        if self.coefficients is None:
            return [], []
        groups = groups[: len(self.coefficients)]
        rows, states = shaped(rule, groups, self.coefficients[: len(groups)])
        updates = [
            Update(
                tuple(group.direction(s) for s in range(row.numel())),
                _of_weights(row, group),
                self._gate(group.options["lr"]),
                float(group.options["weight_decay"]) * group.scale,
                group.active,
            )
            for group, row in zip(groups, rows, strict=True)
        ]
        return updates, states

    def _gate(self, lr: float | Tensor) -> Tensor:
        """The learning rate, or 0 where no coefficient was finite, so that nothing decays."""
        assert self.usable is not None
        if isinstance(lr, Tensor):
            lr = to_device(lr.detach().reshape(()), self.usable.device)
            return torch.where(self.usable, lr, torch.zeros_like(lr))
        dtype = torch.float32 if self.usable.device.type == "mps" else torch.float64
        return self.usable.to(dtype) * max(lr, 0.0)  # schedules that end at 0 may round below it

    def first_order_is_healthy(self, parameters: Iterable[Tensor]) -> bool:
        """False where the FO step must be skipped, as a clean loss was not finite.

        Known for free only where losses live on the CPU. Elsewhere the gradients are turned to
        zero on the device, without waiting for it, and True is returned.
        """
        if self.clean is None:
            return True
        if self.clean.device.type == "cpu":
            return bool(self.clean)
        for p in parameters:
            if p.grad is not None:
                healthy = to_device(self.clean, p.grad.device)
                p.grad = torch.where(healthy, p.grad, torch.zeros_like(p.grad))
        return True

    def saved(self) -> dict[str, Any]:
        """Plain numbers, exact, for a state dict."""

        def plain(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.tolist()

        dtype = None if self.coefficients is None else self.coefficients.dtype
        return {
            "coefficients": plain(self.coefficients),
            "dtype": str(dtype).removeprefix("torch."),
            "usable": plain(self.usable),
            "clean": plain(self.clean),
            **({"per_example": True} if self.per_example else {}),
        }

    @classmethod
    def loaded(cls, saved: dict[str, Any], device: torch.device) -> Estimate:
        """The inverse of :meth:`saved`."""

        def tensor(name: str, dtype: torch.dtype) -> Tensor | None:
            value = saved[name]
            return None if value is None else torch.tensor(value, dtype=dtype, device=device)

        exact = getattr(torch, saved["dtype"], torch.float32)
        return cls(
            tensor("coefficients", exact),
            tensor("usable", torch.bool),
            tensor("clean", torch.bool),
            saved.get("per_example", False),
        )


def _of_weights(row: Tensor, group: ZOGroup) -> Tensor:
    """What multiplies the directions in the update, of a row of shaped coefficients."""
    if group.unit != 1.0:
        row = row * group.unit
    return -row if group.options["maximize"] else row
