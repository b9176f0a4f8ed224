"""Files that are there whole, or not at all, and what JSON can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, beside ``path``: the file takes its place where the block ends well.

    Where the block raises, what was at ``path`` stays as it was, and nothing is left beside it.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        yield fresh
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def strict(value: Any) -> Any:
    """As JSON can hold it: None in place of each number that is not finite."""
    if isinstance(value, dict):
        return {key: strict(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as fresh:
        fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
