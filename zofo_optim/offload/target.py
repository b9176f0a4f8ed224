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
        RuntimeError, AssertionError: by torch, where it has no such device.
    """

    def __init__(self, device: torch.device | str | int | None) -> None:
        self.device = torch.empty(0, device="cpu" if device is None else device).device
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
        """The hooks; where a device is visited, others are told that the model has been placed."""
        if not self.visited:
            return Visits(model)
        base: Any = within_peft(model)
        # transformers' Trainer and accelerate then leave the model where it is
        places = ["", *(name for name, _ in base.named_children())]
        base.hf_device_map = dict.fromkeys(places, self.device)
        return DeviceVisits(model, self.device, _blocks(model) if blocks is None else blocks)


def _blocks(model: nn.Module) -> set[str]:
    """What transformers says must be on one device."""
    return {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
