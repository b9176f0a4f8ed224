"""Results as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .registry import Benchmark, Case
from .timing import Samples, spread, tidy

SCHEMA = 1
"""Version of the result files' layout."""

UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))

Result = dict[str, Any]


def case_result(case: Case, timings: dict[str, Samples]) -> Result:
    """One entry of ``cases`` in a result file."""
    comparisons = []
    for c in case.comparisons:
        pairs = zip(timings[c.top].seconds, timings[c.bottom].seconds, strict=True)
        value = spread([top / bottom + c.plus for top, bottom in pairs])
        comparisons.append(
            {
                "name": c.name,
                "top": c.top,
                "bottom": c.bottom,
                "shown_at": c.shown_at,
                "plus": c.plus,
                "percent": c.percent,
                **value,
                "at_least": c.at_least,
                "at_most": c.at_most,
                "met": c.meets_target(value["median"]),
            }
        )
    return {
        "name": case.name,
        "sizes": case.sizes,
        "notes": case.notes,
        "variants": {
            name: {
                "seconds": spread(samples.seconds),
                "repeats": len(samples.seconds),
                "calls_per_repeat": samples.calls,
                **_rates(case, samples),
            }
            for name, samples in timings.items()
        },
        "comparisons": comparisons,
    }


def _rates(case: Case, samples: Samples) -> dict[str, float]:
    seconds = spread(samples.seconds)["median"]
    rates = {}
    if case.elements is not None:
        rates["elements_per_second"] = tidy(case.elements / seconds)
    if case.bytes is not None:
        rates["bytes_per_second"] = tidy(case.bytes / seconds)
    return rates


def write_json(result: Result, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def durations(seconds: Result) -> str:
    """Median and 20/80 percentiles, such as "630 (606 to 813) µs"."""
    unit, size = next(
        ((unit, size) for unit, size in UNITS if seconds["median"] >= size), UNITS[-1]
    )
    middle, low, high = (f"{seconds[key] / size:.3g}" for key in ("median", "p20", "p80"))
    return f"{middle} ({low} to {high}) {unit}"


def comparison_text(comparison: Result) -> str:
    """Such as "MeZO / this = 22.1 (21.8 to 22.6); target >= 20 met"."""
    percent = comparison["percent"]

    def show(key: str) -> str:
        value = comparison[key]
        return f"{value:.1%}" if percent else f"{value:.3g}"

    text = f"{comparison['name']} {show('median')} ({show('p20')} to {show('p80')})"
    if comparison["met"] is None:
        return text
    sign, key = (">=", "at_least") if comparison["at_least"] is not None else ("<=", "at_most")
    colour, word = ("green", "met") if comparison["met"] else ("red", "missed")
    return f"{text}; target {sign} {show(key)} [{colour}]{word}[/{colour}]"


class Printer:
    """Prints a table per benchmark, filled device by device."""

    def __init__(self, console: Console, entry: Benchmark) -> None:
        self._console = console
        self._table = Table(title=f"{entry.name}: {entry.summary}", title_justify="left")
        self._table.add_column("case and variant")
        self._table.add_column("device", no_wrap=True)
        self._table.add_column("median (20 to 80 %)", justify="right")
        self._table.add_column("M el/s", justify="right", no_wrap=True)
        self._table.add_column("GB/s", justify="right", no_wrap=True)
        self._table.add_column("compared, round by round")

    def missing(self, name: str, device: str, reason: str) -> None:
        self._table.add_row(f"[bold]{name}[/bold]", device, "not measured", "", "", reason)

    def refused(self, name: str, device: str, reason: str) -> None:
        self._table.add_row(f"[bold]{name}[/bold]", device, "[red]refused[/red]", "", "", reason)

    def case(self, case: Result, device: str) -> None:
        self._table.add_row(f"[bold]{case['name']}[/bold]")
        for name, timing in case["variants"].items():
            shown = [c for c in case["comparisons"] if c["shown_at"] == name]
            self._table.add_row(
                f"  {name}",
                device,
                durations(timing["seconds"]),
                _scaled(timing, "elements_per_second", 1e6, 0),
                _scaled(timing, "bytes_per_second", 1e9, 1),
                "\n".join(comparison_text(c) for c in shown),
            )
        self._table.add_section()

    def print(self) -> None:
        self._console.print(self._table)


def _scaled(timing: Result, key: str, scale: float, digits: int) -> str:
    return f"{timing[key] / scale:,.{digits}f}" if key in timing else ""
