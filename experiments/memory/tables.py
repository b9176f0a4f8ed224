"""Measured beside estimated peaks, as Markdown: all cases, and the greatest error by kind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PARTS = {
    "measured": "CPU",
    "measured-cuda": "GPU",
    "offloaded": "CPU, resident",
}
"""Results by the file's name, and what they were measured on."""
Row = Mapping[str, Any]


def kind_of(row: Row, part: str) -> str:
    """Of cases that are one line of the summary."""
    method, weights = row["method"], row["weights"]
    if part == "offloaded":
        return "offloaded weights"
    if "side updates" in method:
        return "side updates"
    if "integers frozen" in method:
        return "integers frozen"
    if "coupled" in method:
        return "coupled"
    if "torchao" in weights:
        return "torchao's integers"
    return "bitsandbytes' integers" if weights in ("int8", "int4") else "16 and 32 bits"


def error_of(row: Row, which: str = "") -> float:
    """Of an estimate, in parts of the measured peak; ``which`` is "_first" for the first step."""
    return float(row[f"estimated{which}"] / row[f"measured{which}"] - 1)


def read(folder: Path) -> dict[str, list[Row]]:
    """Rows by part, of the parts that are there."""
    paths = {part: folder / f"{part}.json" for part in PARTS}
    return {
        part: json.loads(path.read_text(encoding="utf-8"))["rows"]
        for part, path in paths.items()
        if path.exists()
    }


def write(folder: Path) -> None:
    """``table.md`` beside the results."""
    found = read(folder)
    lines = ["# Estimated and measured peaks of memory", ""]
    lines += ["## Greatest error by kind", "", *summary(found)]
    for part, rows in found.items():
        lines += ["", f"## {PARTS[part]}, MB", "", *_cases(rows)]
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def summary(found: Mapping[str, Iterable[Row]]) -> list[str]:
    """A line a kind and device: cases, and the greatest errors of a step, and of the first one.

    The first is that of methods that verify a perturbation then.
    """
    kinds: dict[tuple[str, str], list[Row]] = {}
    for part, rows in found.items():
        for row in rows:
            kinds.setdefault((kind_of(row, part), PARTS[part]), []).append(row)
    lines = ["| kind | on | cases | a step | the first step |", "|---|---|---|---|---|"]
    for (kind, device), rows in kinds.items():
        verifying = [row for row in rows if row["method"].startswith(("zo", "hybrid"))]
        errors = [_greatest(rows, ""), _greatest(verifying, "_first")]
        lines.append(f"| {kind} | {device} | {len(rows)} | {' | '.join(errors)} |")
    return [line.replace("-", "\N{MINUS SIGN}") if "%" in line else line for line in lines]


def _greatest(rows: Iterable[Row], which: str) -> str:
    found = max((error_of(row, which) for row in rows), key=abs, default=None)
    return "" if found is None else f"{round(100 * found, 1) + 0.0:+.1f} %".replace("+0.0", "0.0")


def _cases(rows: Iterable[Row]) -> list[str]:
    heads = "estimated | measured | first, estimated | first, measured"
    lines = [f"| model | method | weights | {heads} |", "|---" * 7 + "|"]
    keys = ("estimated", "measured", "estimated_first", "measured_first")
    for row in rows:
        names = [row["model"], row["method"], row["weights"]]
        lines.append("| " + " | ".join(names + [f"{row[key] / 1e6:.1f}" for key in keys]) + " |")
    return lines
