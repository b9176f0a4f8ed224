"""The device that offloaded weights are computed with on: the CPU, or one that they visit."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from zofo_kernels import matrix_of

from ..names import within_peft
from .device_visits import DeviceVisits
from .maps import HostMemory, Memory, new_map
from .visits import Visits


class Target:
    """
    Args:
        device: None for the CPU.

    Raises:
        ValueError: torch has no such device here, or it has no memory.
    """

    def __init__(self, device: torch.device | str | int | None) -> None:
        try:
            self.device = torch.empty(0, device="cpu" if device is None else device).device
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"device must be one that torch can use here, got {device!r}: {error}"
            ) from error
        if self.device.type == "meta":
            raise ValueError(f"device must compute, got {str(self.device)!r}")
        self.visited = self.device.type != "cpu"
        """Weights are on the host, and visit it; else they are computed with where they are."""

    def memory(self, nbytes: int, folder: str | os.PathLike[str] | None) -> Memory:
        """For weights: a file, or host memory where a device is visited and no folder given."""
        if self.visited and folder is None:
            return HostMemory.of(nbytes, self.device)
        return new_map(folder, nbytes)

    def keeps(self, weight: Tensor) -> bool:
        """Whether it stays on the device: vectors are hardly any memory."""
        return self.visited and (weight.device == self.device or matrix_of(weight.shape) is None)

    def visits(self, model: nn.Module, blocks: Collection[str] | None) -> Visits | DeviceVisits:
        """The hooks."""
        if not self.visited:
            return Visits(model)
        return DeviceVisits(model, self.device, blocks_of(model) if blocks is None else blocks)

    def mark(self, model: nn.Module) -> None:
        """Where a device is visited, transformers' Trainer and accelerate leave the model there."""
        if self.visited:
            base: Any = within_peft(model)
            base.hf_device_map = dict.fromkeys(("", "at rest"), self.device)


def unmark(model: nn.Module) -> None:
    """Undo :meth:`Target.mark`."""
    within_peft(model).__dict__.pop("hf_device_map", None)


def blocks_of(model: nn.Module) -> set[str]:
    """What transformers says must be on one device."""
    return {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
