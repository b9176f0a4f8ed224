"""What `finetune.py` shows and writes: progress, the comparison table, results.json, curves.png."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Result = dict[str, Any]

STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."))
LOG_LINES = 10


class Tracker:
    """A progress bar on a terminal; elsewhere about ten plain lines a run."""

    def __init__(self, console: Console, name: str, steps: int, accuracy: float) -> None:
        self._console, self._name, self._steps = console, name, steps
        self._accuracy, self._step, self._logged = accuracy, 0, 0
        self._started = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  dev {task.fields[accuracy]}"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=steps, loss="-", accuracy=self._percent)

    @property
    def _percent(self) -> str:
        return f"{100 * self._accuracy:.1f} %"

    def __enter__(self) -> Tracker:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, step: int, loss: float | None = None) -> None:
        """One step is done; `loss` where it is at hand (reading it may wait for the device)."""
        self._step = step
        self._progress.update(self._task, completed=step)
        if loss is not None:
            self._progress.update(self._task, loss=f"{loss:.3f}")

    def evaluated(self, accuracy: float, loss: float) -> None:
        """The dev set was evaluated, and the mean training loss since the last time is `loss`."""
        self._accuracy = accuracy
        self._progress.update(self._task, loss=f"{loss:.3f}", accuracy=self._percent)
        due = self._step - self._logged >= self._steps / LOG_LINES or self._step == self._steps
        if self._console.is_terminal or not due:
            return
        self._logged = self._step
        spent = time.perf_counter() - self._started
        left = spent / max(self._step, 1) * (self._steps - self._step)
        self._console.print(
            f"{self._name:<12} step {self._step}/{self._steps}  loss {loss:.4f}  "
            f"dev accuracy {self._percent}  {left:.0f} s left",
            highlight=False,
        )


def summarise(runs: Mapping[int, Result]) -> Result:
    """One result for all seeds: the only one as it is, or means with the seeds beside them.

    The mean curves end where the first seed that stopped early ends.
    """
    results = list(runs.values())
    if len(results) == 1:
        return results[0]
    summary: Result = {}
    for key, value in results[0].items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            values = [result[key] for result in results]
            summary[key] = value if len(set(values)) == 1 else statistics.fmean(values)
    summary["accuracy_after_std"] = statistics.stdev(r["accuracy_after"] for r in results)
    summary["losses"] = [
        statistics.fmean(column) for column in zip(*(r["losses"] for r in results), strict=False)
    ]
    summary["curve"] = [
        {key: statistics.fmean(point[key] for point in points) for key in points[0]}
        for points in zip(*(r["curve"] for r in results), strict=False)
    ]
    summary["seeds"] = {str(seed): result for seed, result in runs.items()}
    return summary


def print_table(console: Console, methods: Mapping[str, Result], title: str) -> None:
    """The comparison, one line a method."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for column in (
        "accuracy\nbefore",
        "accuracy\nafter",
        "loss\nfirst",
        "loss\nlast",
        "\nsteps",
        "\ns/step",
        "peak\nMB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, result in methods.items():
        after = f"{100 * result['accuracy_after']:.1f} %"
        if "accuracy_after_std" in result:
            after += f" ± {100 * result['accuracy_after_std']:.1f}"
        table.add_row(
            name,
            f"{100 * result['accuracy_before']:.1f} %",
            after,
            f"{result['loss_first']:.4f}",
            f"{result['loss_last']:.4f}",
            f"{result['steps']:g}",
            f"{result['seconds_per_step']:.3f}",
            f"{result['peak_memory_bytes'] / 1e6:,.0f}",
        )
    console.print(table)


def write_results(path: Path, methods: Mapping[str, Result], **more: Any) -> None:
    path.write_text(
        json.dumps({"methods": methods, **more}, indent=1, default=str) + "\n", encoding="utf-8"
    )


def smooth(values: Sequence[float]) -> tuple[list[int], list[float]]:
    """A running mean over about a twentieth of the run (at least five steps), at window centres."""
    window = min(len(values), max(5, len(values) // 20))
    means = [statistics.fmean(values[i : i + window]) for i in range(len(values) - window + 1)]
    return [i + (window + 1) // 2 for i in range(len(means))], means


def plot_curves(path: Path, methods: Mapping[str, Result], title: str) -> None:
    """Training loss and dev accuracy against steps; with several seeds, the mean and the range."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (name, result), (colour, dash) in zip(methods.items(), cycle(STYLES), strict=False):
        runs = list(result.get("seeds", {"": result}).values())
        for run in runs if len(runs) > 1 else ():
            left.plot(*smooth(run["losses"]), color=colour, alpha=0.25, linewidth=1)
        left.plot(*smooth(result["losses"]), dash, color=colour, linewidth=1.8)
        points = [p["step"] for p in result["curve"]]
        accuracy = [100 * p["accuracy"] for p in result["curve"]]
        marker = "o" if len(points) <= 40 else None
        right.plot(points, accuracy, dash, color=colour, label=name, marker=marker, markersize=3.5)
        if len(runs) > 1:
            columns = list(zip(*([p["accuracy"] for p in r["curve"]] for r in runs), strict=False))
            low, high = [100 * min(c) for c in columns], [100 * max(c) for c in columns]
            right.fill_between(points, low, high, color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="training loss (running mean)")
    right.set(xlabel="step", ylabel="dev accuracy, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
