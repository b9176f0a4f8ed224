"""Transposed matrices of low-rank directions: a product with W^T is one that has a closed form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .low_rank import Source

_ALWAYS = {torch.t, Tensor.t, *(getattr(Tensor, name).__get__ for name in ("T", "mT"))}
_OF_TWO = {torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_SUMS = {torch.addmm, Tensor.addmm}

Call = tuple[Any, tuple[Any, ...]]


def transposes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call gives its first argument, a matrix, transposed."""
    if kwargs or args[0].dim() != 2:
        return False
    if func in _ALWAYS:
        return True
    return func in _OF_TWO and sorted(dim % 2 for dim in args[1:]) == [0, 1]


class Transposes:
    """Plain views of matrices, transposed, that stand for the displaced ones in an evaluation."""

    def __init__(self) -> None:
        self.sources: dict[int, Source] = {}
        """By ``id`` of the view."""
        self._views: dict[int, Tensor] = {}  # or others may get their ids

    def of(self, source: Source) -> Tensor:
        where = id(source.parameter)
        if where not in self._views:
            self._views[where] = source.parameter.detach().t()
            self.sources[id(self._views[where])] = source
        return self._views[where]

    def undo(self, values: Iterable[Any]) -> list[Any]:
        """The values, with matrices in place of such views."""
        found = [(self.sources.get(id(value)), value) for value in values]
        return [value if source is None else source.parameter for source, value in found]

    def product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The same product with the matrix itself, where the call is one with such a view."""
        if kwargs or not args or id(args[-1]) not in self.sources:
            return None
        *others, view = args
        (weight,) = self.undo([view])
        if any(id(other) in self.sources for other in others):
            return None
        if func in _PRODUCTS and len(others) == 1:
            return F.linear, (*others, weight)
        if func in _SUMS and len(others) == 2 and others[0].dim() == 1:
            return F.linear, (others[1], weight, others[0])
        if func is F.linear and len(others) == 1:
            return torch.matmul, (*others, weight)
        return None
