"""Results as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .measure import Measured
from .registry import Benchmark, Case, Comparison
from .timing import Samples, spread, tidy

SCHEMA = 1
"""Version of the result files' layout."""

UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))

Result = dict[str, Any]


def case_result(case: Case, measured: Measured) -> Result:
    """One entry of ``cases`` in a result file."""
    comparisons = []
    for c in case.comparisons:
        value = _compared(c, measured)
        if value is None:
            continue
        comparisons.append(
            {
                "name": c.name,
                "of": c.of,
                "top": c.top,
                "bottom": c.bottom,
                "shown_at": c.shown_at,
                "times": c.times,
                "plus": c.plus,
                "percent": c.percent,
                **value,
                "at_least": c.at_least,
                "at_most": c.at_most,
                "met": c.meets_target(value["median"]),
            }
        )
    found: Result = {
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
            for name, samples in measured.seconds.items()
        },
        "comparisons": comparisons,
    }
    for name, samples in measured.host_seconds.items():
        found["variants"][name]["host_seconds"] = spread(samples.seconds)
    if measured.peak_bytes:
        found["peak_bytes"] = dict(measured.peak_bytes)
    return found


def _compared(c: Comparison, measured: Measured) -> dict[str, float] | None:
    """Round by round; one value for memory; None where it was not measured."""
    if c.of == "peak_bytes":
        top, bottom = (measured.peak_bytes.get(name) for name in (c.top, c.bottom))
        return None if top is None or bottom is None else spread([c.times * top / bottom + c.plus])
    samples = measured.seconds if c.of == "seconds" else measured.host_seconds
    if not samples:
        return None
    pairs = zip(samples[c.top].seconds, samples[c.bottom].seconds, strict=True)
    return spread([c.times * one / other + c.plus for one, other in pairs])


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

    text = f"{comparison['name']} {show('median')}"
    if comparison["of"] != "peak_bytes":
        text += f" ({show('p20')} to {show('p80')})"
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

    def progress(self, text: str) -> None:
        self._console.print(f"[dim]{text}[/dim]")

    def missing(self, name: str, device: str, reason: str) -> None:
        self._table.add_row(f"[bold]{name}[/bold]", device, "not measured", "", "", reason)

    def refused(self, name: str, device: str, reason: str) -> None:
        self._table.add_row(f"[bold]{name}[/bold]", device, "[red]refused[/red]", "", "", reason)

    def case(self, case: Result, device: str) -> None:
        self._table.add_row(f"[bold]{case['name']}[/bold]", "", "", "", "", _missing(case))
        for name, timing in case["variants"].items():
            shown = [comparison_text(c) for c in case["comparisons"] if c["shown_at"] == name]
            self._table.add_row(
                f"  {name}",
                device,
                durations(timing["seconds"]),
                _scaled(timing, "elements_per_second", 1e6, 0),
                _scaled(timing, "bytes_per_second", 1e9, 1),
                "\n".join([*_also(case, name), *shown]),
            )
        self._table.add_section()

    def print(self) -> None:
        self._console.print(self._table)


def _also(case: Result, name: str) -> list[str]:
    """What was measured of a variant beside its time."""
    timing = case["variants"][name]
    lines = []
    if "host_seconds" in timing:
        lines.append(f"returns after {durations(timing['host_seconds'])}")
    if "torch_operations" in timing:
        started = f"torch operations: {timing['torch_operations']}"
        if timing["launches"] is not None:
            started += f"; launches: {timing['launches']}"
        lines.append(started)
    peak = case.get("peak_bytes", {}).get(name)
    if peak is not None:
        lines.append(f"peak memory: {peak / 1e6:,.1f} MB")
    return lines


def _missing(case: Result) -> str:
    """What could not be measured of a case."""
    absent = []
    if any(timing.get("launches", 1) is None for timing in case["variants"].values()):
        absent.append("launches")
    if None in case.get("peak_bytes", {}).values():
        absent.append("peak memory")
    return f"{' and '.join(absent)}: not measured" if absent else ""


def _scaled(timing: Result, key: str, scale: float, digits: int) -> str:
    return f"{timing[key] / scale:,.{digits}f}" if key in timing else ""
