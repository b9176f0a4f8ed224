"""Fields of a configuration that general rules do not find."""

from __future__ import annotations

from typing import Any, NamedTuple


class Special(NamedTuple):
    """Fields to set after shrinking, by dotted path for nested ones, and why."""

    why: str
    fields: dict[str, Any]


DROP = object()
"""In place of a value: the field is left out, and follows from the others."""
NO_DEFAULT = "has no default, and the model needs it"
DIM = "the parts' widths must fit each other"
