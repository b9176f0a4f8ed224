"""What a trainer counts while it evaluates a loss: one evaluation of a step is to count."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROOM = 10_000
"""Larger dictionaries are data, not counts; larger lists only get longer."""
_DEPTH = 4
"""Of dictionaries in dictionaries."""

Undo = Callable[[], None]


class Counts:
    """The numbers, lists and dictionaries that are attributes of an object, as they are now.

    Trainers of other libraries keep their metrics in such attributes, under names of their own.
    Lists are compared as a whole, dictionaries item by item; whatever else they hold is left alone.

    Args:
        owner: the object.
    """

    def __init__(self, owner: object) -> None:
        self._attributes = vars(owner)
        self._kept: list[tuple[str, Any, Undo]] = []
        for name, value in self._attributes.items():
            if "dataset" not in name and (undo := _undo(value)) is not None:
                self._kept.append((name, value, undo))

    @torch.inference_mode()  # where torch may write all tensors
    def restore(self) -> None:
        """As they were; the objects are the same ones."""
        for name, value, undo in self._kept:
            self._attributes[name] = value
            undo()


def _undo(value: Any, depth: int = 0) -> Undo | None:
    """What takes back changes that are made to ``value`` from now on; None if it is no count."""
    if isinstance(value, (int, float, np.number)):
        return lambda: None
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad:
        return _of_tensor(value)
    if isinstance(value, dict) and len(value) <= _ROOM and depth < _DEPTH:
        return _of_dictionary(value, depth)
    if isinstance(value, (list, deque)):
        return _of_list(value)
    return None


def _of_tensor(value: Tensor) -> Undo:
    content, version = value.clone(), _version(value)

    def undo() -> None:
        if version is None or _version(value) != version:
            value.copy_(content)

    return undo


def _version(value: Tensor) -> int | None:
    """None where torch counts none."""
    return None if value.is_inference() else value._version


def _of_dictionary(value: dict[Any, Any], depth: int) -> Undo:
    items = dict(value)
    inner = [found for item in items.values() if (found := _undo(item, depth + 1)) is not None]

    def undo() -> None:
        if not _same([*items, *items.values()], [*value, *value.values()]):
            value.clear()
            value.update(items)
        for one in inner:
            one()

    return undo


def _of_list(value: list[Any] | deque[Any]) -> Undo:
    if isinstance(value, list) and len(value) > _ROOM:
        length = len(value)

        def shorten() -> None:
            del value[length:]

        return shorten
    items = list(value)

    def undo() -> None:
        if not _same(items, value):
            value.clear()
            value.extend(items)

    return undo


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))
