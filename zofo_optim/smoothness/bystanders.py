"""Leaves of a loss's graph that nobody measures: a backward must leave no gradients in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Bystanders:
    """Finds them in each graph that is back-propagated, and puts their gradients back.

    An evaluation's ``look``; see :class:`zofo_optim.watch.Look`.

    Args:
        known: leaves whose gradients others look after.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {id(p) for p in known}
        self._before: dict[int, tuple[Tensor, Tensor | None]] = {}

    def look(self, root: Tensor, scaled: bool) -> None:
        front: list[Any] = [root.grad_fn]
        seen = set()
        while front:
            node = front.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            front += [below for below, _ in node.next_functions]
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in self._known | self._before.keys():
                self._before[id(leaf)] = leaf, leaf.grad
                leaf.grad = None  # else the backward would add to it in place

    def looked_at(self, parameter: Tensor) -> None:
        """Reading gradients does no harm."""

    def put_back(self) -> None:
        for leaf, gradient in self._before.values():
            leaf.grad = gradient
        self._before = {}
