"""Weights that are displaced themselves, for a while, and then restored to the bit.

Of sharded ones each process displaces what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from zofo_kernels import Shift, uninterrupted
from zofo_kernels._torch_compat import set_version

from ..sharding import local_of, pieces_of
from .base import written
from .low_rank import Source


class Written:
    """Displaces parameters, and keeps their content aside.

    Args:
        backend: of ``zofo_kernels``.
        writing: is called before writes.
    """

    def __init__(self, backend: str, writing: Callable[[], None]) -> None:
        self._backend, self._writing = backend, writing
        self._kept: dict[int, _Kept] = {}

    @property
    def ids(self) -> Collection[int]:
        """Of the parameters that are displaced now."""
        return self._kept.keys()

    @contextmanager
    def displaced(self, part: Sequence[Source], shifts: Sequence[Shift]) -> Iterator[None]:
        """These, each by its group's shift."""
        self._writing()
        self._kept = {id(s.parameter): _Kept.of(local_of(s.held)) for s in part}
        try:
            for source in part:
                displace_(source, shifts[source.group], self._backend)
            yield
        finally:
            self.put_back()

    def put_back(self) -> None:
        """Where a write fails, the others are done, and the next call tries it again."""
        if not self._kept:
            return
        failed: BaseException | None = None
        try:
            self._writing()
        except BaseException as error:
            failed = error
        with uninterrupted(), torch.inference_mode():  # where torch may write all tensors
            for where, kept in list(self._kept.items()):
                try:
                    if kept.failed is None or kept.failed == written(kept.parameter):
                        kept.parameter.copy_(kept.content)
                        if not kept.parameter.is_inference():
                            set_version(kept.parameter, kept.before[1])  # for graphs that saved it
                    del self._kept[where]
                except BaseException as error:
                    failed = failed or error
                    self._kept[where] = kept._replace(failed=written(kept.parameter))
        if failed is not None:
            raise failed


def displace_(source: Source, shift: Shift, backend: str) -> None:
    """Write to what this process holds of a parameter."""
    with uninterrupted(), torch.inference_mode():
        moved = source.pieces(source.held, shift, backend)
        for piece, content in zip(pieces_of(source.held), moved, strict=True):
            piece.tensor.copy_(content)


class _Kept(NamedTuple):
    """What verification displaces, and its content before."""

    parameter: Tensor
    """As much as this process holds."""
    content: Tensor
    before: tuple[int, int]
    """The parameter then, see :func:`written`."""
    failed: tuple[int, int] | None = None
    """Where putting it back failed: the parameter as it was then, likewise."""

    @classmethod
    def of(cls, parameter: Tensor) -> _Kept:
        return cls(parameter, parameter.detach().clone(), written(parameter))
