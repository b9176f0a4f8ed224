"""A picture of each benchmark's results; matplotlib without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Result = dict[str, Any]


def _bars(result: Result, path: Path, key: str, scale: float, label: str) -> None:
    """Horizontal bars of all variants, grouped by case; log axis, 20/80 percentiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(v for case in result["cases"] for v in case["variants"]))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    rows = sum(len(case["variants"]) + 1 for case in result["cases"])
    figure = Figure(figsize=(8, 1.2 + 0.16 * rows), layout="constrained")
    axes = figure.add_subplot()
    shown: set[str] = set()
    ticks, y = [], 0.0
    for case in result["cases"]:
        first = y
        for name, timing in case["variants"].items():
            seconds = timing["seconds"]
            middle = timing[key] if key in timing else seconds["median"]
            middle, span = middle / scale, seconds
            ends = (span["p20"] / span["median"], span["p80"] / span["median"])
            low, high = (1 / ends[1], 1 / ends[0]) if key in timing else ends
            axes.barh(
                y,
                middle,
                height=0.9,
                color=colours[name],
                label=name if name not in shown else None,
                xerr=[[max(middle - middle * low, 0)], [max(middle * high - middle, 0)]],
                error_kw={"elinewidth": 0.8},
            )
            shown.add(name)
            y += 1
        ticks.append(((first + y - 1) / 2, case["name"]))
        y += 1
    axes.set_yticks([t for t, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    _title(axes, result)
    FigureCanvasAgg(figure).print_png(path)


def _title(axes: Any, result: Result) -> None:
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['torch_threads']} threads"
    axes.set_title(f"{result['benchmark']}: {where}", fontsize=9)


def rates(result: Result, path: Path) -> None:
    """Elements a second of each variant."""
    _bars(result, path, "elements_per_second", 1e6, "million elements a second (more is better)")


def times(result: Result, path: Path) -> None:
    """Time of each variant."""
    _bars(result, path, "", 1e-3, "milliseconds (less is better)")


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
