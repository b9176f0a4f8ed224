"""Counters kept on the device that holds the loss, read without making it wait."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import caller_level

FLAT_STEPS = 5
"""Steps in a row with bit-identical losses before a warning."""


class Monitor:
    """Counts steps with non-finite estimates, and steps whose losses did not move at all."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None  # int64 (2,): skipped steps, flat steps in a row
        self._mirror: Tensor | None = None  # the same on the host, possibly a step late
        self._warned = False

    @property
    def skipped(self) -> int:
        """Number of steps with a non-finite estimate. Reading it waits for the device."""
        return 0 if self._counts is None else int(self._counts[0])

    def record(self, finite: Tensor, flat: Tensor) -> None:
        """Note one step.

        Args:
            finite: 0-dim bool, all coefficients of the step are finite.
            flat: 0-dim bool, all losses of the step are bit-identical.
        """
        if self._counts is None or self._mirror is None or self._counts.device != finite.device:
            old = self._counts
            self._counts = torch.zeros(2, dtype=torch.int64, device=finite.device)
            if old is not None:
                self._counts.copy_(old)
            pin = finite.device.type == "cuda"
            self._mirror = torch.zeros(2, dtype=torch.int64, pin_memory=pin)
        self._counts[0] += (~finite).to(torch.int64)
        self._counts[1] = (self._counts[1] + 1) * flat.to(torch.int64)
        self._mirror.copy_(self._counts, non_blocking=True)

    def warn_if_flat(self, names: Callable[[], list[str]]) -> None:
        """Warn, once, that perturbing the parameters ``names()`` does not change the loss."""
        if self._warned or self._mirror is None or int(self._mirror[1]) < FLAT_STEPS:
            return
        self._warned = True
        warnings.warn(
            f"the loss was bit-identical under perturbation for {FLAT_STEPS} steps: the "
            "zeroth-order parameters do not reach the loss (an unused module, a closure that "
            "does not run the model, a constant loss, or FSDP2 without "
            "fully_shard(model, reshard_after_forward=True)). Parameters: " + ", ".join(names()),
            stacklevel=caller_level(),
        )
