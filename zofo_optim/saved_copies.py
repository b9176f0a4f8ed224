"""Copies that a backward needs: autograd keeps how they are made, and they are made again there.

A graph through a copy of a weight, perturbed or on another device, would hold it until its
backward, and all copies together are as large as the weights. Only memory that is a copy's own is
so replaced; what torch computes of one, such as autocast's 16-bit version, is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from zofo_kernels._torch_compat import without_torch_functions

Make = Callable[[], Tensor]


class _Copy(NamedTuple):
    """One that was made; its memory may be another's by now."""

    memory: StorageWeakRef
    version: int
    dtype: torch.dtype
    offset: int
    make: Make


class _Recipe(NamedTuple):
    """What stands for a copy, or a view of it, in a graph."""

    make: Make
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Active(threading.local):
    """In this thread, the innermost last."""

    def __init__(self) -> None:
        self.all: list[SavedCopies] = []


_active = _Active()


def keeping_out() -> SavedCopies | None:
    """What keeps copies out of the graph that is being made; None: nothing does."""
    return _active.all[-1] if _active.all else None


class SavedCopies:
    """Keeps the copies of one evaluation out of its graph."""

    def __init__(self) -> None:
        self._made: dict[int, _Copy] = {}  # by place

    def remember(self, copy: Tensor, make: Make) -> None:
        """``make`` gives the same elements, with the same strides, at any later time."""
        storage = copy.untyped_storage()
        if storage.nbytes() > copy.nbytes:  # in memory that is there anyway, as of closed forms
            return
        memory = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        at = self._place(storage)
        self._made[at] = _Copy(memory, copy._version, copy.dtype, int(copy.storage_offset()), make)

    def _place(self, storage: torch.UntypedStorage) -> int:
        """Of a copy's memory, among all memory that there is at a time."""
        return storage.data_ptr()

    @contextmanager
    def unkept(self) -> Generator[None, None, None]:
        """What is saved for a backward in here holds no copy.

        Raises:
            RuntimeError: ``torch.func`` is used, which knows no such hooks.
        """
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                _active.all.append(self)
                try:
                    yield
                finally:
                    _active.all.remove(self)
        except RuntimeError as error:
            if "support saved tensor hooks" not in str(error):
                raise
            raise RuntimeError(
                "closure must not use torch.func where coupling > 0 and perturbation='streamed', "
                "as it does not let graphs do without perturbed copies; use "
                "perturbation='in_place' or coupling=0"
            ) from error

    def _pack(self, saved: Tensor) -> Any:
        if type(saved) not in (Tensor, torch.nn.Parameter) or saved.layout != torch.strided:
            return saved
        try:
            place = self._place(saved.untyped_storage())
        except RuntimeError:  # it has no memory of its own, as in forward-mode derivatives
            return saved
        known = self._made.get(place)
        if known is None or known.memory.expired():  # type: ignore[no-untyped-call]
            return saved
        if saved._version != known.version or saved.dtype != known.dtype:
            return saved
        offset = int(saved.storage_offset()) - known.offset
        return _Recipe(known.make, saved.size(), saved.stride(), offset)

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        if not isinstance(packed, _Recipe):
            return packed  # type: ignore[no-any-return]
        with without_torch_functions(), torch.no_grad():
            copy = packed.make()
            offset = int(copy.storage_offset()) + packed.offset
            return copy.as_strided(packed.size, packed.stride, offset)
