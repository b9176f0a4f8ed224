"""Figure 2 of Ma, Yu, Huang 2026: hybrid tuning at a small rate, at a large one, at one for each.

The runs are those of ``compare --rates prompt``, by plain SGD at constant rates as in the paper:
AdamW would scale the adapter's steps by itself, and the same number would not be the same rate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from zofo_optim.whole import strict

from ..compare import CompareOptions, rates
from ..finetune import Runs, model_name
from ..options import EVERYTHING
from ..plots import diverges, plot_rates
from ..report import Result, markdown, mean
from .options import TheoryOptions
from .studies import chosen

ADAPTER = "prompt"
EVALUATIONS = 6
_LOSSES = ("train_loss", "loss")
Panels = dict[str, dict[str, list[Result]]]
"""Runs by heading and method."""
KEPT = ("task", "method", "seed", "curve", "skipped_steps")


def measure(options: TheoryOptions, console: Console) -> dict[str, Any]:
    found = {}
    for model, study in chosen(options):
        if study.split is None:
            continue
        given = CompareOptions(
            model=model,
            data=options.data,
            seeds=options.seeds,
            steps=options.steps or study.steps,
            eval_every=max(1, (options.steps or study.steps) // EVALUATIONS),
            batch_size=options.batch_size,
            train_size=options.train_size,
            dev_size=options.dev_size,
            test_size=options.dev_size,
            lr_zo=study.split[0],
            lr_fo=study.split[1],
            optimizer="sgd",
            schedule="constant",
            patience=0,
            samples=1,
            include=[EVERYTHING],
            no_save=True,
            out=options.out / "runs" / "fig2" / model_name(model),
        )
        panels = rates(Runs(given, console), study.task, ADAPTER)
        found[f"{model_name(model)}, {study.task}"] = {
            heading: {
                method: [strict({name: run[name] for name in KEPT}) for run in runs]
                for method, runs in lines.items()
            }
            for heading, lines in panels
        }
    return found


def _panels(content: dict[str, Any]) -> Iterator[tuple[str, Panels]]:
    """By model and task; numbers that were not finite are NaN again."""
    for name, panels in content["result"].items():
        yield (
            name,
            {
                heading: {
                    method: [{**run, "curve": [*map(_numbers, run["curve"])]} for run in runs]
                    for method, runs in lines.items()
                }
                for heading, lines in panels.items()
            },
        )


def _numbers(point: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in point.items()}


def _lines(panels: Panels) -> Iterator[tuple[str, str, list[Result]]]:
    for heading, lines in panels.items():
        for method, runs in lines.items():
            yield heading, method, runs


def table(content: dict[str, Any]) -> str:
    head = ["model, task", "rates", "method", "steps", "seeds", "training loss at first"]
    rows = [[*head, "training loss at last", "development loss at last"]]
    for name, panels in _panels(content):
        for heading, method, runs in _lines(panels):
            first = statistics.fmean(run["curve"][0]["train_loss"] for run in runs)
            ends = ["diverges"] * 2
            if not diverges(runs):
                last = [run["curve"][-1] for run in runs]
                ends = [mean([point[which] for point in last], 3) for which in _LOSSES]
            sizes = [str(runs[0]["curve"][-1]["step"]), str(len(runs)), f"{first:.3f}"]
            rows.append([name, heading, method, *sizes, *ends])
    return (
        "Plain SGD at constant rates; ± sample deviation over seeds. Diverges: the mean ends above "
        f"its start, or is no number.\n\n{markdown(rows)}"
    )


def plot(path: Path, content: dict[str, Any]) -> None:
    """A file a model."""
    for name, panels in _panels(content):
        model = name.partition(",")[0]
        title = f"{name}, {ADAPTER} tuning, SGD"
        plot_rates(path.with_name(f"{path.stem}-{model}.png"), list(panels.items()), title)
