"""A picture of each benchmark's results; matplotlib without a display."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Result = dict[str, Any]
Spread = tuple[float, float, float]
"""Median, 20 and 80 percentile."""


class Panel(NamedTuple):
    """What one axis shows of a case for each name under ``among``; None where there is nothing."""

    label: str
    value: Callable[[Result, str], Spread | None]
    log: bool = True
    among: str = "variants"

    def shown(self, case: Result) -> dict[str, Spread]:
        found = {name: self.value(case, name) for name in case.get(self.among, {})}
        return {name: spread for name, spread in found.items() if spread is not None}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, result: Result, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, torch threads: {machine['torch_threads']}"
    figure.suptitle(f"{result['benchmark']}: {where}", fontsize=9)
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]


def _spread(seconds: dict[str, float], unit: float) -> Spread:
    return seconds["median"] / unit, seconds["p20"] / unit, seconds["p80"] / unit


def _dots(axes: Any, cases: list[Result], names: list[str], panel: Panel) -> None:
    """A row of dots a case, one a name, with percentiles."""
    found = [panel.shown(case) for case in cases]
    for name in names:
        rows = [row for row, shown in enumerate(found) if name in shown]
        spreads = [found[row][name] for row in rows]
        middles = [s[0] for s in spreads]
        sides = [[max(0.0, s[0] - s[1]) for s in spreads], [max(0.0, s[2] - s[0]) for s in spreads]]
        style = "o" if name.startswith("zofo") else "x"
        axes.errorbar(middles, rows, xerr=sides, fmt=style, ms=5, lw=1, label=name)
    axes.set_yticks(range(len(cases)), [case["name"] for case in cases], fontsize=7)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    if panel.log:
        _log_axis(axes)
    else:
        axes.set_xlim(0, 1.05 * max(s[2] for shown in found for s in shown.values()))
    axes.set_xlabel(panel.label, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _rows(result: Result, path: Path, *panels: Panel) -> None:
    """Panels of dots side by side over the same cases; those with nothing to show are left out."""
    cases = result["cases"]
    shown = [panel for panel in panels if any(map(panel.shown, cases))]
    names = list(dict.fromkeys(n for panel in shown for case in cases for n in panel.shown(case)))
    figure = _figure(3 + 5 * len(shown), 1.7 + 0.35 * len(cases))
    row = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, panel in zip(row, shown, strict=True):
        _dots(axes, cases, names, panel)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=5)
    _save(figure, result, path)


def _milliseconds(case: Result, name: str) -> Spread:
    return _spread(case["variants"][name]["seconds"], 1e-3)


def _gigabytes_per_second(case: Result, name: str) -> Spread:
    timing = case["variants"][name]
    seconds = timing["seconds"]
    scale = timing["bytes_per_second"] * seconds["median"] / 1e9
    return scale / seconds["median"], scale / seconds["p80"], scale / seconds["p20"]


def _copy_share(case: Result, name: str) -> Spread | None:
    for c in case["comparisons"]:
        if (c["top"], c["shown_at"]) == ("copy_", name):
            return 100 * c["median"], 100 * c["p20"], 100 * c["p80"]
    return None


def _host_microseconds(case: Result, name: str) -> Spread:
    timing = case["variants"][name]
    return _spread(timing.get("host_seconds", timing["seconds"]), 1e-6)


def _started(key: str) -> Callable[[Result, str], Spread | None]:
    def value(case: Result, name: str) -> Spread | None:
        number = case["variants"][name].get(key)
        return (number, number, number) if number else None

    return value


def _peak(case: Result, name: str) -> Spread | None:
    peak = case["peak_bytes"][name]
    return (peak / 1e6,) * 3 if peak is not None else None


def rates(result: Result, path: Path) -> None:
    """Necessary traffic a second of each variant, and ours as a share of copying."""
    _rows(
        result,
        path,
        Panel("GB/s, each weight read and written once (more is better)", _gigabytes_per_second),
        Panel("% of the bandwidth of copying (more is better)", _copy_share, log=False),
    )


def steps(result: Result, path: Path) -> None:
    """Time of each variant, and peak memory where it was measured."""
    _rows(
        result,
        path,
        Panel("milliseconds a step (less is better)", _milliseconds),
        Panel("peak memory, MB (less is better)", _peak, log=False, among="peak_bytes"),
    )


def passes(result: Result, path: Path) -> None:
    """Time until the call returns, and what it starts."""
    _rows(
        result,
        path,
        Panel("µs until the call returns (less is better)", _host_microseconds),
        Panel("torch operations of a call", _started("torch_operations")),
        Panel("kernels launched by a call", _started("launches")),
    )


def growth(result: Result, path: Path) -> None:
    """Seconds of a step against parameters and against tensors."""
    figure = _figure(9, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, axis, size in ((left, "parameters", "elements"), (right, "tensors", "tensors")):
        cases = [case for case in result["cases"] if case["sizes"]["axis"] == axis]
        x = [case["sizes"][size] for case in cases]
        for name in dict.fromkeys(v for case in cases for v in case["variants"]):
            spans = [case["variants"][name]["seconds"] for case in cases]
            axes.plot(x, [s["median"] for s in spans], marker="o", markersize=3, label=name)
            axes.fill_between(x, [s["p20"] for s in spans], [s["p80"] for s in spans], alpha=0.2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"number of {axis}")
        axes.grid(alpha=0.3)
    left.set_ylabel("seconds a step (less is better)")
    left.legend(fontsize=7)
    sizes = result["cases"][0]["sizes"]
    left.set_title(f"one tensor, {sizes['dtype']}", fontsize=9)
    total = next((c["sizes"]["elements"] for c in cases), 0)
    right.set_title(f"about {total:,} parameters in all", fontsize=9)
    _save(figure, result, path)
