"""What offloading a model gives back."""

from __future__ import annotations

import weakref

from torch import nn

from .device_visits import DeviceVisits
from .maps import Map, Memory
from .target import unmark
from .visits import Visits


class Offload:
    """What :func:`offload_weights` did: the weights stay offloaded as long as the model has them.

    Args:
        model: whose weights they are.
        visits: the hooks.
        memory: that they are in; None where the call only placed what was added to the model.
        count: of weights in it.
    """

    def __init__(
        self, model: nn.Module, visits: Visits | DeviceVisits, memory: Memory | None, count: int
    ) -> None:
        self._model = weakref.ref(model)
        self._visits = visits
        self._memory = memory
        self.nbytes = 0 if memory is None else len(memory)
        """Of the private file, or the host memory."""
        self.count = count
        """Of the weights that went there."""

    def remove(self) -> None:
        """Take the hooks off: pages then stay resident until the kernel needs their memory.

        With ``device=``, the model then computes only when it is moved, as by ``model.to("cpu")``.
        """
        self._visits.remove()
        model = self._model()
        if model is not None and isinstance(self._visits, DeviceVisits):
            unmark(model)

    def drop(self) -> None:
        """Let all pages leave memory, after something outside of training has read the weights.

        Does nothing where they are in host memory.
        """
        if isinstance(self._memory, Map):
            self._memory.drop(0, self.nbytes)

    def __repr__(self) -> str:
        return f"Offload({self.count} tensors, {self.nbytes / 1e6:,.1f} MB)"
