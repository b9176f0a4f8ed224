"""A partition in letters: at most 100 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .budgets import shown

if TYPE_CHECKING:
    from .partition import Partition, Row

WIDTH = 100
_HEAD = ("depth", "mode", "tensor", "shape", "importance", "FLOPs", "bytes")
_LEFT = (1, 2, 3)
"""Columns that are aligned to the left."""


def of(partition: Partition) -> str:
    """A line for each tensor, nearest the loss first, and the totals."""
    lines = [_HEAD, *(_line(k, row) for k, row in enumerate(partition.rows))]
    widths = [max(len(line[c]) for line in lines) for c in range(len(_HEAD))]
    others = sum(widths) - widths[2] + 2 * (len(_HEAD) - 1)
    widths[2] = min(widths[2], WIDTH - others)
    found = []
    for line in lines:
        cells = [_cut(text, widths[c]) if c == 2 else text for c, text in enumerate(line)]
        padded = [
            text.ljust(widths[c]) if c in _LEFT else text.rjust(widths[c])
            for c, text in enumerate(cells)
        ]
        found.append("  ".join(padded).rstrip())
    rule = "-" * max(map(len, found))
    return "\n".join([found[0], rule, *found[1:], rule, summary(partition)])


def _line(depth: int, row: Row) -> tuple[str, ...]:
    return (
        str(depth),
        row.mode,
        row.name,
        "x".join(map(str, row.shape)) or "scalar",
        "" if row.importance is None else f"{row.importance:.4f}",
        shown(row.flops),
        shown(row.bytes, "B"),
    )


def _cut(name: str, width: int) -> str:
    """The end says more than the beginning."""
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]


def summary(partition: Partition) -> str:
    """Lines of at most 100 columns."""
    p = partition
    parts = []
    for mode, said in (("fo", "first-order"), ("zo", "zeroth-order"), ("frozen", "frozen")):
        rows = [row for row in p.rows if row.mode == mode]
        numbers = sum(_count(row) for row in rows)
        if rows or mode != "frozen":
            parts.append(f"{said}: {len(rows)} tensors ({shown(numbers).strip()})")
    budget = f"{p.budget:g}" if isinstance(p.budget, float) else str(p.budget)
    lines = [
        f"policy {p.policy}, budget {budget} of {p.of}",
        "; ".join(parts),
        f"backward: {shown(p.flops, 'FLOPs')} of {shown(p.full_flops, 'FLOPs')}"
        f"{_share(p.flops, p.full_flops)}; forward: {shown(p.forward_flops, 'FLOPs')}",
        f"memory beyond inference: {shown(p.bytes, 'B')} of {shown(p.full_bytes, 'B')}"
        f"{_share(p.bytes, p.full_bytes)}"
        + ("" if p.peak is None else f"; peak of a step: {shown(p.peak, 'B')}"),
    ]
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f" ({part / whole:.1%})" if whole else ""


def _count(row: Row) -> int:
    count = 1
    for size in row.shape:
        count *= size
    return count
