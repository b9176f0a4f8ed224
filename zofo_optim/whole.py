"""Files that are there whole, or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, beside ``path``: the file takes its place where the block ends well.

    Where the block raises, what was at ``path`` stays as it was.
    """
    fresh = path.with_name(path.name + ".new")
    yield fresh
    fresh.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as fresh:
        fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
