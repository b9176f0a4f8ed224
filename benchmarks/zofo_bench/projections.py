"""Projections of the model of scaling as a file and a picture; nothing in them is measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cluster import ETHERNET, GPU, INFINIBAND
from .report import SCHEMA, write_json
from .scaling import LLAMA_7B, LLAMA_70B, STRATEGIES, Work, projected
from .timing import tidy

GPUS = tuple(2**k for k in range(11))
MODELS, NETWORKS = (LLAMA_7B, LLAMA_70B), (INFINIBAND, ETHERNET)


def points() -> list[dict[str, Any]]:
    """A point a network, model, strategy and number of GPUs whose memory holds it."""
    found = []
    for network in NETWORKS:
        for model in MODELS:
            for name, strategy in STRATEGIES.items():
                for gpus in GPUS:
                    step = projected(strategy, model, network, gpus)
                    if step is None:
                        continue
                    parts = {key: tidy(value) for key, value in asdict(step).items()}
                    where = dict(network=network.name, model=model.name, strategy=name, gpus=gpus)
                    found.append({**where, "seconds": tidy(step.seconds), **parts})
    return found


def write(folder: Path) -> None:
    """``scaling.json``, with all assumptions, and ``scaling.png``."""
    result = {
        "schema": SCHEMA,
        "benchmark": "scaling",
        "projected": "by a model; nothing was measured on a GPU",
        "gpu": asdict(GPU()),
        "networks": [asdict(network) for network in NETWORKS],
        "models": [asdict(model) for model in MODELS],
        "work": asdict(Work()),
        "points": points(),
    }
    write_json(result, folder / "scaling.json")
    plot(result["points"], folder / "scaling.png")  # type: ignore[arg-type]


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds a step against GPUs; a column a model, a row a network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(9, 6.5), layout="constrained", dpi=90)
    grid = figure.subplots(len(NETWORKS), len(MODELS), sharex=True, sharey="col")
    for row, network in zip(grid, NETWORKS, strict=True):
        for axes, model in zip(row, MODELS, strict=True):
            for place, name in enumerate(STRATEGIES):
                own = [p for p in found if p["strategy"] == name and p["model"] == model.name]
                own = [p for p in own if p["network"] == network.name]
                axes.plot(
                    [p["gpus"] for p in own],
                    [1e3 * p["seconds"] for p in own],
                    "--" if name.startswith("FO") else "-",
                    color=f"C{place}",
                    marker="os^vDP*X"[place],
                    ms=3,
                    lw=1.2,
                    label=name,
                )
            axes.set(xscale="log", yscale="log")
            axes.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_title(f"{model.name}, {network.name}", fontsize=9)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("GPUs, 2,048 tokens each", fontsize=8)
    for row in grid:
        row[0].set_ylabel("ms a step", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=4)
    figure.suptitle("Projected, not measured: time of a step on H200 GPUs", fontsize=10)
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]
