"""Tables of the results in Markdown, as docs/architectures.md has them."""

from __future__ import annotations

from collections.abc import Mapping

from .reasons import reason
from .records import CHECKS, Result, built, passed
from .tasks import TASKS

Classes = Mapping[str, Result]


def counts_table(classes: Classes) -> str:
    """Of each task: classes, those that were built, and those that pass each check and all."""
    titles = ["task", "classes", "built tiny", *(c.replace("_", " ") for c in CHECKS), "all"]
    lines = [_row(titles), _row(["---"] * len(titles))]
    for task in [*TASKS, None]:
        chosen = [r for r in classes.values() if task in (r["task"], None)]
        if chosen:
            counts = [len(chosen), sum(map(built, chosen))]
            counts += [sum(check in r.get("passed", ()) for r in chosen) for check in CHECKS]
            counts.append(sum(map(passed, chosen)))
            lines.append(_row([TASKS[task].title if task else "**all**", *map(str, counts)]))
    return "\n".join(lines)


def failures_table(classes: Classes) -> str:
    """Classes that do not pass, and why: those of one reason in one line."""
    by_reason: dict[str, list[str]] = {}
    for name, result in sorted(classes.items()):
        if not passed(result):
            by_reason.setdefault(reason(name, result), []).append(f"`{name}`")
    lines = [_row(["why", "classes"]), _row(["---", "---"])]
    for why in sorted(by_reason, key=lambda why: (-len(by_reason[why]), why)):
        lines.append(_row([why, ", ".join(by_reason[why])]))
    return "\n".join(lines)


def text_only(classes: Classes) -> list[str]:
    """Classes of images and texts that were given texts alone."""
    return sorted(
        name
        for name, result in classes.items()
        if result["task"] == "image_text_to_text" and built(result) and not _sees(result["inputs"])
    )


def _sees(inputs: list[str]) -> bool:
    return any("pixel" in name or "patches" in name for name in inputs)


def to_the_bit(classes: Classes) -> int:
    """Classes in which the first perturbed loss is the same to the bit, in place and streamed."""
    return sum(bool(result.get("to_the_bit")) for result in classes.values())


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
