"""Offloaded weights in a rehearsal: which of their pages are resident, and when.

As :mod:`zofo_optim.offload` has it: pages come when something reads a weight, and leave when its
module is done, or its gradient has moved on. Pages of embeddings come by rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zofo_kernels._torch_compat import tree_leaves

from ..costs.memory import LiveBytes

_AROUND = 1 << 16
"""Bytes that Linux maps around an address that is read, ``fault_around_bytes``."""
_VIEWS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.t.default)
"""Operations that read no element."""
_BY_ROWS = {torch.ops.aten.embedding.default: (0, 1), torch.ops.aten.index.Tensor: (0, 1)}
"""Where such an operation has its weight and its rows."""


class VisitedBytes(LiveBytes):  # type: ignore[no-untyped-call]
    """Bytes that are alive, and those of offloaded weights that are resident.

    What is mapped around the ends of a weight is its neighbours', and stays until these are done.

    Args:
        sizes: of the offloaded weights, in bytes, by ``id`` of their storage.
    """

    def __init__(self, sizes: dict[int, int]) -> None:
        super().__init__()
        self._sizes = sizes
        self._resident: dict[int, int] = {}
        self.visiting = 0
        """Bytes that are resident."""
        self.most_visiting = 0
        """The largest that ``visiting`` has been."""
        self._change(min(_AROUND * len(sizes), sum(sizes.values())))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in () if func in _VIEWS else tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self.read(tensor, _read_by_rows(func, args))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def read(self, tensor: Tensor, most: int | None = None) -> None:
        """A weight's pages come, or at most so many bytes of them."""
        key = id(tensor.untyped_storage())
        if key in self._sizes:
            size = self._sizes[key] if most is None else min(most, self._sizes[key])
            self._change(max(0, size - self._resident.get(key, 0)))
            self._resident[key] = max(size, self._resident.get(key, 0))

    def drop(self, weights: Iterable[int]) -> None:
        """Their pages leave."""
        for key in weights:
            self._change(-self._resident.pop(key, 0))

    def _change(self, by: int) -> None:
        self.visiting += by
        self.now += by
        self.most = max(self.most, self.now)
        self.most_visiting = max(self.most_visiting, self.visiting)


def _read_by_rows(func: Any, args: Any) -> int | None:
    """The most bytes that the operation can read of its weight; None: all."""
    if func not in _BY_ROWS:
        return None
    weight, rows = (args[place] for place in _BY_ROWS[func])
    count = sum(t.numel() for t in tree_leaves(rows) if isinstance(t, Tensor))
    width = weight.numel() // max(1, weight.shape[0]) * weight.element_size()
    return int(count * (width + _AROUND))


class Offloaded(ABC):
    """The weights of a model on meta that are offloaded.

    Args:
        weights: of them.
    """

    where: str
    """They are: in a "map", or on the "host" of a device."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._sizes = {id(p.untyped_storage()): p.nbytes for p in weights}

    @property
    def nbytes(self) -> int:
        """Of the file or the host memory that has them."""
        return sum(self._sizes.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest weight."""
        return max(self._sizes.values(), default=0)

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is offloaded."""
        return id(tensor.untyped_storage()) in self._sizes

    @property
    @abstractmethod
    def most(self) -> int:
        """Bytes of weights that were there to compute with at a time, in all passes so far."""

    @abstractmethod
    def watch(self, written: Collection[Tensor]) -> LiveBytes:
        """For one pass.

        Args:
            written: weights that were written to just before it begins.
        """

    @abstractmethod
    def remove(self) -> None:
        """The model's hooks."""


class VisitingPages(Offloaded):
    """The frozen weights of a model, as if they were in a map.

    Args:
        model: it is given hooks.
    """

    where = "map"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(p for p in model.parameters() if is_plain_and_frozen(p))
        self._watches: list[VisitedBytes] = []
        self._behind: list[int] = []  # of the module whose gradient came last
        self._handles = []
        for module in model.modules():
            if own := self._of(module.parameters(recurse=False)):
                after: Any = partial(self._after, own)
            elif inside := self._of(module.parameters()):
                after = partial(self._after_inside, inside)
            else:
                continue
            self._handles.append(module.register_forward_hook(after))

    @property
    def most(self) -> int:
        return max((watch.most_visiting for watch in self._watches), default=0)

    def watch(self, written: Collection[Tensor]) -> VisitedBytes:
        self._watches.append(VisitedBytes(self._sizes))
        self._behind = []
        for weight in written:
            self._watches[-1].read(weight)
        return self._watches[-1]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _of(self, parameters: Iterable[Tensor]) -> list[int]:
        keys = [id(p.untyped_storage()) for p in parameters]
        return [key for key in keys if key in self._sizes]

    def _after(self, own: list[int], module: nn.Module, args: Any, output: Any) -> None:
        self._watches[-1].drop(own)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad and not tensor.is_leaf:
                tensor.register_hook(partial(self._gradient_came, own))  # type: ignore[no-untyped-call]

    def _after_inside(self, inside: list[int], module: nn.Module, args: Any, output: Any) -> None:
        self._watches[-1].drop(inside)

    def _gradient_came(self, own: list[int], gradient: Tensor) -> None:
        if self._behind is not own:
            self._watches[-1].drop(self._behind)
        self._behind = own


def is_plain_and_frozen(parameter: Tensor) -> bool:
    """Whether ``offload_weights`` takes it away from a CPU."""
    plain = parameter.is_floating_point() or parameter.is_complex()
    return plain and not parameter.requires_grad and parameter.numel() > 0
