"""Closures that training frameworks pass to ``step`` in shapes of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Closure = Callable[[], Any]
_LIGHTNING = ("lightning", "pytorch_lightning")


def unless_empty(closure: Closure | None) -> Closure | None:
    """``closure``, or None for what Lightning passes where its user gave none.

    That one holds hooks that belong before the step; they are run.
    """
    if closure is None or getattr(_inner(closure), "__name__", "") != "do_nothing_closure":
        return closure
    with torch.enable_grad():
        closure()
    return None


def may_skip(closure: Closure) -> bool:
    """Whether None from ``closure`` says to skip the batch: from Lightning's ``training_step``."""
    bases = type(_inner(closure)).__mro__
    return any(
        base.__name__ == "AbstractClosure" and base.__module__.split(".")[0] in _LIGHTNING
        for base in bases
    )


def _inner(closure: Any) -> Any:
    """What Lightning's precision plugins have wrapped; their last argument."""
    while isinstance(closure, partial) and closure.args and callable(closure.args[-1]):
        closure = closure.args[-1]
    return closure
