"""Offloaded weights that visit a GPU, in a rehearsal: the visits themselves, on the meta device."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from zofo_kernels import matrix_of

from ..costs.memory import LiveBytes
from ..offload.device_visits import DeviceVisits
from ..offload.target import blocks_of
from ..saved_copies import SavedCopies
from .offloaded import Offloaded, is_plain_and_frozen
from .streamed import RehearsedCopies


class VisitingDevice(Offloaded):
    """The frozen matrices of a model, as if they visited the device block by block.

    Args:
        model: it is given the hooks that ``offload_weights(device=)`` gives.
    """

    where = "host"

    def __init__(self, model: nn.Module) -> None:
        weights = [p for p in model.parameters() if is_plain_and_frozen(p)]
        super().__init__(p for p in weights if matrix_of(p.shape) is not None)
        self._visits = _Visits(model, blocks_of(model), self._sizes)

    @property
    def most(self) -> int:
        return self._visits.most

    def watch(self, written: Collection[Tensor]) -> LiveBytes:
        return LiveBytes()

    def remove(self) -> None:
        self._visits.remove()


class _Visits(DeviceVisits):
    """
    Args:
        model, blocks: see :class:`DeviceVisits`.
        sizes: of what is offloaded, in bytes, by ``id`` of its storage.
    """

    def __init__(self, model: nn.Module, blocks: Collection[str], sizes: dict[int, int]) -> None:
        self.most = 0
        self._sizes = sizes
        super().__init__(model, torch.device("meta"), blocks)

    def enter(self, module: nn.Module, inputs: Any) -> Any:
        result = super().enter(module, inputs)
        coming = () if self._coming is None else self._coming[1].of
        there = [*(h.parameter for h in self._home.values()), *(c.tensor for c in coming)]
        self.most = max(self.most, sum(t.nbytes for t in there))
        return result

    def _moved(self, inputs: Any) -> Any:
        """Nothing: no input is elsewhere, also where a forward makes one on the CPU."""

    def _goes(self, parameter: Tensor) -> bool:
        return id(parameter.untyped_storage()) in self._sizes

    def _is_on_host(self, parameter: Tensor) -> bool:
        return True

    def _saved_copies(self) -> SavedCopies:
        return RehearsedCopies()
