"""A picture of each benchmark's results; matplotlib without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Result = dict[str, Any]


def _dots(result: Result, path: Path, key: str | None, scale: float, label: str) -> None:
    """A row of dots a case, one for each variant: median and 20/80 percentiles, log axis.

    ``key`` is a rate of the variants, or None for their seconds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = result["cases"]
    names = list(dict.fromkeys(name for case in cases for name in case["variants"]))
    figure = Figure(figsize=(8, 1.5 + 0.35 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    for name in names:
        rows = [row for row, case in enumerate(cases) if name in case["variants"]]
        timings = [cases[row]["variants"][name] for row in rows]
        spans = [t["seconds"] for t in timings]
        values = [(t[key] if key else t["seconds"]["median"]) / scale for t in timings]
        slower = [s["p80"] / s["median"] for s in spans]
        faster = [s["median"] / s["p20"] for s in spans]
        up, down = (faster, slower) if key else (slower, faster)
        low = [value - value / ratio for value, ratio in zip(values, down, strict=True)]
        high = [value * ratio - value for value, ratio in zip(values, up, strict=True)]
        style = "o" if name.startswith("zofo") else "x"
        axes.errorbar(values, rows, xerr=[low, high], fmt=style, ms=5, lw=1, label=name)
    axes.set_yticks(range(len(cases)), [case["name"] for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside lower center", ncols=4)
    _title(axes, result)
    FigureCanvasAgg(figure).print_png(path)


def _title(axes: Any, result: Result) -> None:
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, torch threads: {machine['torch_threads']}"
    axes.set_title(f"{result['benchmark']}: {where}", fontsize=9)


def rates(result: Result, path: Path) -> None:
    """Elements a second of each variant."""
    _dots(result, path, "elements_per_second", 1e6, "million elements a second (more is better)")


def times(result: Result, path: Path) -> None:
    """Time of each variant."""
    _dots(result, path, None, 1e-3, "milliseconds (less is better)")


def growth(result: Result, path: Path) -> None:
    """Seconds of a step against parameters and against tensors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
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
    _title(left, result)
    total = next((c["sizes"]["elements"] for c in cases), 0)
    right.set_title(f"{total:,} parameters in all", fontsize=9)
    FigureCanvasAgg(figure).print_png(path)
