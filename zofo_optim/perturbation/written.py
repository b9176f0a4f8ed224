"""Weights that are displaced themselves, for a while, and then restored to the bit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from zofo_kernels import Shift, perturb_, uninterrupted
from zofo_kernels._torch_compat import set_version

from .base import written
from .low_rank import Source


class Written:
    """Displaces parameters, and keeps their content aside.

    Args:
        backend: of ``zofo_kernels``.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._kept: dict[int, _Kept] = {}

    @property
    def ids(self) -> Collection[int]:
        """Of the parameters that are displaced now."""
        return self._kept.keys()

    @contextmanager
    def displaced(self, part: Sequence[Source], shifts: Sequence[Shift]) -> Iterator[None]:
        """These, each by its group's shift."""
        self._kept = {
            id(s.parameter): _Kept(s.parameter, s.parameter.detach().clone(), written(s.parameter))
            for s in part
        }
        try:
            for source in part:
                shift = shifts[source.group]
                perturb_(
                    [source.parameter],
                    shift.direction,
                    shift.scale,
                    indices=[source.noise_index],
                    backend=self._backend,
                )
            yield
        finally:
            self.put_back()

    def put_back(self) -> None:
        """Where a write fails, the others are done, and the next call tries it again."""
        failed: BaseException | None = None
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


class _Kept(NamedTuple):
    """A parameter that verification displaces, and its content before."""

    parameter: Tensor
    content: Tensor
    before: tuple[int, int]
    """The parameter then, see :func:`written`."""
    failed: tuple[int, int] | None = None
    """Where putting it back failed: the parameter as it was then, likewise."""
