"""Options as Python has them: state dicts, journals and pickles hold no scalars of numpy."""

from __future__ import annotations

from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """The same with Python's numbers in place of numpy's scalars, also in tuples, lists and dicts.

    Containers come back as they are where there is nothing to replace; none is changed.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value.item()
    kind = type(value)  # no subclasses, which may hold more than their items
    if kind is dict:
        made = {name: plain(item) for name, item in value.items()}
        return made if any(made[name] is not value[name] for name in made) else value
    if kind in (list, tuple):
        items = [plain(item) for item in value]
        return kind(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


def make_plain(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group's options, in their dictionary; its parameters are left alone."""
    for name, value in group.items():
        if name not in ("params", "param_names"):
            found = plain(value)
            if found is not value:
                group[name] = found
    return group
