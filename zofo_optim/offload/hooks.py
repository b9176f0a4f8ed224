"""Hooks of modules that copies and pickles of a model leave behind, since these are in memory."""

from __future__ import annotations

from typing import Any


class Hook:
    """A module's hook; what it becomes in a copied or pickled module does nothing."""

    def __reduce__(self) -> tuple[type[Nothing], tuple[()]]:
        return Nothing, ()


class Nothing:
    """Is called in place of a hook."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None
