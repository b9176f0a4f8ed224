"""Results by class, in a JSON file that is whole after every class."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

CHECKS = ("streamed", "low_rank", "restored", "lora")
Result = Mapping[str, Any]


class Records:
    """The file's classes, to add to.

    Args:
        path: of the JSON file.
        keep: whether what it has stays.
    """

    def __init__(self, path: Path, keep: bool) -> None:
        self.path = path
        self.classes: dict[str, Any] = {}
        if keep and path.is_file():
            self.classes = json.loads(path.read_text(encoding="utf-8"))["classes"]

    def done(self, name: str, again: bool, failed_only: bool) -> bool:
        """Whether a class needs no run: it has one, unless runs or failed ones are made again."""
        if name not in self.classes:
            return False
        if failed_only:
            return passed(self.classes[name])
        return not again

    def add(self, name: str, result: Result) -> None:
        """Write one class's result, and all others again."""
        self.classes[name] = dict(result)
        versions = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
        found = {"versions": versions, "classes": dict(sorted(self.classes.items()))}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    def line(self, name: str) -> str:
        """Of one class, for the terminal."""
        result = self.classes[name]
        if "not_built" in result:
            return f"not built: {result['not_built']}"
        failed = "; ".join(f"{key}: {why}" for key, why in result["failed"].items())
        return f"{len(result['passed'])} passed, {result['seconds']} s" + (
            f"; FAILED {failed}" if failed else ""
        )


def built(result: Result) -> bool:
    return "not_built" not in result


def passed(result: Result) -> bool:
    """Whether all checks passed."""
    return built(result) and not result["failed"]


def summary(classes: Mapping[str, Result]) -> str:
    """Counts, in lines."""
    tasks = sorted({r["task"] for r in classes.values()})
    lines = [f"{'task':24} {'classes':>7} {'built':>6} {'passed':>6}"]
    for task in [*tasks, "all"]:
        chosen = [r for r in classes.values() if task in (r["task"], "all")]
        counts = len(chosen), sum(map(built, chosen)), sum(map(passed, chosen))
        lines.append(f"{task:24} {counts[0]:7} {counts[1]:6} {counts[2]:6}")
    return "\n".join(lines)
