"""The paper's Table 1 beside ours in kind: what zeroth order in the base adds to an adapter."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence

from ..report import markdown
from .runs import RESULTS

TASKS = ("SST-2", "COPA", "WinoGrande")
ADAPTERS = ("prompt", "prefix", "lora")
TABLE1: dict[str, tuple[tuple[float, ...], ...]] = {
    "Llama-2-7B": (
        (93.58, 95.64, 95.9, 91.05, 91.63, 94.61, 93.4),
        (87, 88, 88, 83, 85, 84, 88),
        (67.5, 67.2, 68.9, 66.2, 64.3, 68.5, 66.3),
    ),
    "Vicuna-7B": (
        (91.40, 94.38, 94.95, 90.02, 90.71, 94.61, 92.20),
        (87, 84, 84, 80, 83, 85, 84),
        (64.7, 65.8, 66.3, 64.1, 74, 66.7, 66.7),
    ),
    "OPT-1.3B": (
        (91.51, 91.28, 91.74, 92.2, 91.7, 92.2, 92.3),
        (78, 74, 77, 77, 78, 78, 78),
        (57.9, 57.8, 59.9, 58.3, 60, 59, 58.3),
    ),
}
"""Ma, Yu, Huang 2026, Table 1: accuracy in percent by task of :data:`TASKS`: zeroth order alone,
then first order and hybrid by adapter. Vicuna's 74 is as printed."""

DOUBTED = ("Vicuna-7B", "WinoGrande", "prefix")


def differences(model: str) -> list[list[float]]:
    """Hybrid less first order, in points: a row a task, a column an adapter."""
    return [[row[2 + 2 * i] - row[1 + 2 * i] for i in range(3)] for row in TABLE1[model]]


def table() -> str:
    """The paper's differences."""
    rows = [["model, task", *ADAPTERS]]
    for model in TABLE1:
        for task, row in zip(TASKS, differences(model), strict=True):
            rows.append([f"{model}, {task}", *(_signed(value, 1) for value in row)])
    rows.append(["mean of the nine", *(_signed(value, 1) for value in means())])
    rows.append(["the same without the 74", *(_signed(value, 1) for value in means(doubted=False))])
    return markdown(rows)


def means(doubted: bool = True) -> list[float]:
    """Over models and tasks, by adapter; perhaps without what looks like a misprint."""
    columns: list[list[float]] = [[], [], []]
    for model in TABLE1:
        for task, row in zip(TASKS, differences(model), strict=True):
            for adapter, value in enumerate(row):
                if doubted or (model, task, ADAPTERS[adapter]) != DOUBTED:
                    columns[adapter].append(value)
    return [statistics.fmean(column) for column in columns]


def ours() -> str:
    """Of the seven methods on all tasks: accuracy in points, and test loss, seed by seed."""
    rows = [["model, task", *ADAPTERS, *(f"{name}, loss" for name in ADAPTERS)]]
    for folder in ("minilm", "stories260k"):
        file = RESULTS / folder / "runs.csv"
        with file.open(encoding="utf-8", newline="") as text:
            runs = list(csv.DictReader(text))
        for task in dict.fromkeys(run["task"] for run in runs):
            own = [run for run in runs if run["task"] == task]
            name = "MiniLM" if folder == "minilm" else folder
            row = [f"{name}, {task}"]
            for column, scale, digits in (("test_accuracy", 100, 1), ("test_loss", 1, 3)):
                for adapter in ADAPTERS:
                    gains = _gains(own, adapter, column)
                    row.append(_paired([scale * value for value in gains], digits))
            rows.append(row)
    return markdown(rows)


def _gains(runs: Sequence[dict[str, str]], adapter: str, column: str) -> list[float]:
    """Hybrid less first order, seed by seed; empty where there is no such score."""
    values = {(run["method"], run["seed"]): float(run[column]) for run in runs if run[column] != ""}
    seeds = sorted({seed for _, seed in values})
    return [values[f"hybrid-{adapter}", s] - values[f"fo-{adapter}", s] for s in seeds]


def _paired(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = statistics.stdev(values)
    text = f"{_signed(statistics.fmean(values), digits)} ± {spread:.{digits}f}"
    return f"**{text}**" if abs(statistics.fmean(values)) > spread else text


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
