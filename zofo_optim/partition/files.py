"""Partitions as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..whole import write_json

if TYPE_CHECKING:
    from .partition import Partition

FORMAT = "zofo-optim partition"
VERSION = 1


def save(partition: Partition, path: str | os.PathLike[str]) -> None:
    """Write ``partition``; see :meth:`Partition.save`."""
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(partition)}
    write_json(Path(path), content)


def load(path: str | os.PathLike[str]) -> Partition:
    """Read one; see :meth:`Partition.load`."""
    from .partition import Partition, Row

    data = Path(path).read_bytes()
    try:
        content = json.loads(data.decode())
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        if (version := content.pop("version", None)) != VERSION:
            raise ValueError(f"its version is {version!r}, not {VERSION}")
        for name in ("rows", "include", "exclude"):
            if not isinstance(content.get(name), list):
                raise ValueError(f"{name} is no list")
        rows = tuple(_row(Row, entry) for entry in content.pop("rows"))
        patterns: dict[str, Any] = {n: tuple(content.pop(n)) for n in ("include", "exclude")}
        made = Partition(rows=rows, **patterns, **content)
        _check(made)
    except (TypeError, ValueError) as error:  # as are JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"path must be of a saved Partition, got {str(path)!r}: {error}") from None
    return made


def _row(cls: Any, entry: Any) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        raise ValueError(f"a row has no shape: {entry!r:.80}")
    return cls(**{**entry, "shape": tuple(entry["shape"])})


def _check(partition: Partition) -> None:
    """Of the kinds that a partition has; names once."""
    from ..settings import DIRECTIONS
    from .budgets import KINDS
    from .partition import MODES
    from .policies import POLICIES

    p = partition
    numbers = [p.flops, p.full_flops, p.forward_flops, p.bytes, p.full_bytes]
    numbers += [n for row in p.rows for n in row.shape] + ([] if p.peak is None else [p.peak])
    shares = [n for row in p.rows for n in (row.flops, row.bytes)]
    floats = [n for row in p.rows for n in (row.importance, row.gradient_norm) if n is not None]
    texts = [t for row in p.rows for t in (row.name, row.why)] + [*p.include, *p.exclude]
    names = [row.name for row in p.rows]
    rules = {
        "its numbers are no ints >= 0": all(type(n) is int and n >= 0 for n in numbers),
        "shares of its rows are no ints": all(type(n) is int for n in shares),
        "importances are no numbers": all(type(n) in (int, float) for n in floats),
        "its names are no strings": all(isinstance(text, str) for text in texts),
        f"a mode is not one of {MODES}": all(row.mode in MODES for row in p.rows),
        "a frozen row does not say why": all(row.why or row.mode != "frozen" for row in p.rows),
        "candidate of a row is no bool": all(isinstance(row.candidate, bool) for row in p.rows),
        "a row is first-order and no candidate": not any(
            row.mode == "fo" and not row.candidate for row in p.rows
        ),
        "a name is there twice": len(set(map(str, names))) == len(names),
        f"of is not one of {KINDS}": p.of in KINDS,
        f"policy is not one of {tuple(POLICIES)}": p.policy in POLICIES,
        f"directions is not one of {DIRECTIONS}": p.directions in DIRECTIONS,
        "budget is no number or string": isinstance(p.budget, (int, float, str)),
        "in_backward is no bool": isinstance(p.in_backward, bool),
    }
    for wrong, holds in rules.items():
        if not holds:
            raise ValueError(wrong)
