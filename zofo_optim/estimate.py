"""What backward(closure) leaves for step(): coefficients, and whether the losses were finite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Pending:
    """Sums over the accumulated micro-batches; every tensor stays on the loss's device."""

    coefficients: Tensor | None = None
    """Shape (ZO groups, num_samples); None with FO groups only."""
    usable: Tensor | None = None
    """0-dim bool: some coefficient of some micro-batch was finite."""
    clean: Tensor | None = None
    """0-dim bool: every clean loss was finite; None where none was taken with ZO groups."""

    def add(self, coefficients: Tensor, usable: Tensor, clean: Tensor | None) -> None:
        if self.coefficients is None or self.usable is None:
            self.coefficients, self.usable, self.clean = coefficients, usable, clean
            return
        if coefficients.shape != self.coefficients.shape:
            raise ValueError(
                "accumulated estimates must have the same groups and samples, got shape "
                f"{tuple(coefficients.shape)} after {tuple(self.coefficients.shape)}; call "
                "step() or zero_grad() before adding a parameter group"
            )
        self.coefficients = self.coefficients + coefficients
        self.usable = self.usable | usable
        if clean is not None:
            self.clean = clean if self.clean is None else self.clean & clean

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
        }

    @classmethod
    def loaded(cls, saved: dict[str, Any], device: torch.device) -> Pending:
        """The inverse of :meth:`saved`."""

        def tensor(name: str, dtype: torch.dtype) -> Tensor | None:
            value = saved[name]
            return None if value is None else torch.tensor(value, dtype=dtype, device=device)

        exact = getattr(torch, saved["dtype"], torch.float32)
        return cls(
            tensor("coefficients", exact), tensor("usable", torch.bool), tensor("clean", torch.bool)
        )

    def gate(self, lr: float | Tensor) -> Tensor:
        """The learning rate, or 0 where no coefficient was finite, so that nothing decays."""
        assert self.usable is not None
        if isinstance(lr, Tensor):
            lr = lr.detach().reshape(()).to(self.usable.device, non_blocking=True)
            return torch.where(self.usable, lr, torch.zeros_like(lr))
        dtype = torch.float32 if self.usable.device.type == "mps" else torch.float64
        return self.usable.to(dtype) * lr

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
                healthy = self.clean.to(p.grad.device, non_blocking=True)
                p.grad = torch.where(healthy, p.grad, torch.zeros_like(p.grad))
        return True
