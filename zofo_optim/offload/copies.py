"""Copies of the host's weights on a device, made on a stream of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .maps import pages_of


class Copy(NamedTuple):
    """Of a weight, on the device."""

    parameter: Tensor
    tensor: Tensor
    of: tuple[int, int]
    """What it was made of, see :func:`content`."""


class Copies(NamedTuple):
    """Of a block's weights, as soon as ``made``."""

    of: Sequence[Copy]
    made: Any


def content(parameter: Tensor) -> tuple[int, int]:
    """Another pair where something has written to it."""
    return parameter.data_ptr(), parameter._version


class Copier:
    """
    Args:
        device: of the copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = _streams_of(device)
        self._stream: Any = None if self._streams is None else self._streams.Stream(device)

    def copies(self, hosts: Sequence[Tensor]) -> Copies:
        """Made in the stream's own time, after what the present stream has been asked for.

        Their memory is the present stream's, in whose order it is used again.
        """
        made = [
            Copy(p, torch.empty_like(p, device=self._device, requires_grad=False), content(p))
            for p in hosts
        ]
        if self._streams is None:
            _copy(made)
            return Copies(made, None)
        self._stream.wait_stream(self._streams.current_stream(self._device))
        try:
            with self._streams.stream(self._stream):
                _copy(made)
                return Copies(made, self._stream.record_event())
        except BaseException:
            self._stream.synchronize()  # before their memory is given back
            raise

    def wait(self, copies: Copies | None) -> None:
        """What is computed from now on finds them made."""
        if copies is not None and self._streams is not None:
            self._streams.current_stream(self._device).wait_event(copies.made)

    def finish(self) -> None:
        """Wait, in this process, until all are made."""
        if self._stream is not None:
            self._stream.synchronize()


def _streams_of(device: torch.device) -> Any:
    """The module that has the device's streams; None: it has none."""
    return None if device.type in ("cpu", "meta") else torch.get_device_module(device)


def _copy(made: Sequence[Copy]) -> None:
    for parameter, tensor, _ in made:
        tensor.copy_(parameter.detach(), non_blocking=True)
        if (pages := pages_of(parameter)) is not None:
            pages.drop()
