"""Weights in a map visit memory module by module.

A module's pages come as it computes and leave when it is done; those of the module that came after
it the last time are read ahead meanwhile. In a backward they leave as the gradient goes on to the
modules before. All of this is advice to the kernel: what a module reads is right whenever it reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zofo_kernels._torch_compat import tree_leaves, uncompiled

from .hooks import Hook
from .maps import Pages, merged, pages_of


class Visits:
    """The hooks of a model's modules.

    Args:
        model: some of whose parameters are in a map.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own: dict[int, list[Pages]] = {}  # by id of the module
        self._next: dict[int, int] = {}
        self._before: dict[int, int] = {}
        self._last: int | None = None  # that a forward pass came to
        self._behind: int | None = None  # whose gradient came last
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            if own := _pages(module.parameters(recurse=False)):
                self._own[id(module)] = own
                self._handles += [
                    module.register_forward_pre_hook(_Come(self, id(module))),
                    module.register_forward_hook(_Leave(self, id(module)), always_call=True),
                ]
            elif inside := _pages(module.parameters()):
                # what another module than its own reads leaves at the latest here
                after = _Drop(inside)
                self._handles.append(module.register_forward_hook(after, always_call=True))

    def remove(self) -> None:
        """No hooks any more; pages stay where the kernel leaves them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def come(self, here: int) -> None:
        """A module computes; read the next one's pages ahead."""
        if self._last is not None and self._last != here:
            self._next[self._last], self._before[here] = here, self._last
        self._last = here
        self._prefetch(self._next.get(here))

    def leave(self, here: int) -> None:
        """It is done."""
        _drop(self._own[here])

    def backward(self, here: int) -> None:
        """A module's backward is next: those of later modules are done."""
        if self._behind is not None and self._behind != here:
            _drop(self._own[self._behind])
        self._behind = here
        self._prefetch(self._before.get(here))

    def _prefetch(self, where: int | None) -> None:
        for pages in () if where is None else self._own[where]:
            pages.prefetch()


class _Come(Hook):
    """Before a module computes."""

    def __init__(self, visits: Visits, here: int) -> None:
        self._visits, self._here = visits, here

    @uncompiled
    def __call__(self, module: nn.Module, args: Any) -> None:
        self._visits.come(self._here)


class _Leave(_Come):
    """After it."""

    @uncompiled
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:  # type: ignore[override]
        self._visits.leave(self._here)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad and not tensor.is_leaf:
                tensor.register_hook(self._backward)  # type: ignore[no-untyped-call]

    def _backward(self, gradient: Tensor) -> None:
        self._visits.backward(self._here)


class _Drop(Hook):
    """After a module that contains others."""

    def __init__(self, pages: list[Pages]) -> None:
        self._pages = pages

    @uncompiled
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        _drop(self._pages)


def _pages(parameters: Iterable[Tensor]) -> list[Pages]:
    found = (pages_of(p) for p in parameters)
    return merged(pages for pages in found if pages is not None)


def _drop(some: Iterable[Pages]) -> None:
    for pages in some:
        pages.drop()
