"""Leaves of a loss's graph that nobody measures: a backward must leave no gradients in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zofo_kernels._torch_compat import backward_within


class Bystanders:
    """Finds them in each graph that is back-propagated, and puts their gradients back.

    An evaluation's ``look``; see :class:`zofo_optim.watch.Look`.

    Args:
        known: leaves whose gradients others look after.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {id(p) for p in known}
        self._before: dict[int, tuple[Tensor, Tensor | None]] = {}

    def look(self, root: Tensor, scaled: bool = False) -> None:
        for node in nodes(root):
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in self._known | self._before.keys():
                self._before[id(leaf)] = leaf, leaf.grad
                leaf.grad = None  # else the backward would add to it in place

    def looked_at(self, parameter: Tensor) -> None:
        """Reading gradients does no harm."""

    def in_backward(self) -> AbstractContextManager[None]:
        """Around evaluations: re-entrant checkpointing has graphs of its own in the backward."""
        return backward_within(_Inner(self))

    def put_back(self) -> None:
        for leaf, gradient in self._before.values():
            leaf.grad = gradient
        self._before = {}


class _Inner(TorchFunctionMode):
    def __init__(self, bystanders: Bystanders) -> None:
        super().__init__()
        self._bystanders = bystanders

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.backward and args:
            roots = [args[0]] if isinstance(args[0], Tensor) else args[0]
            for root in roots:
                self._bystanders.look(root)
        return func(*args, **(kwargs or {}))


def nodes(root: Tensor) -> Iterator[Any]:
    """All operations of a graph, once each, and where it ends in leaves."""
    front: list[Any] = [root.grad_fn]
    seen = set()
    while front:
        node = front.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            front += [below for below, _ in node.next_functions]
