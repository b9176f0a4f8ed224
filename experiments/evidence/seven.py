"""The paper's seven methods on all tasks, and full fine-tuning where it was run likewise.

The protocol of `experiments.compare`: 16 examples a step, MeZO's sizes. Seconds are those that the
runs took, two at a time on two cores, so they compare roughly. Runs of `experiments.directions` on
the same tasks for as many steps have other development examples: they have no place at equal time.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from ..partition.grid import Study
from ..partition.problems import Sizes
from ..partition.recipes import (
    ALL,
    BIASES,
    GAUSSIAN,
    LORA,
    PER_EXAMPLE,
    PLAIN,
    PREFIX,
    PROMPT,
    Recipe,
    Saving,
    step_name,
)
from ..report import Result
from . import kinds
from .found import Entry, Found, key
from .grid import CAUSAL, ENCODER, savings
from .kinds import Rows, rows
from .runs import RESULTS

BATCH = 16
SIZES = Sizes(1000, 200, 1000)
FOLDERS = {ENCODER: "minilm", CAUSAL: "stories260k"}
FIRST = {"lora": LORA, "prompt": PROMPT, "prefix": PREFIX, "": ""}
PEAKS = RESULTS / "evidence" / "peaks.json"
"""Of steps that save memory, of this protocol; see steps.py."""


def read() -> list[Found]:
    """By model and task."""
    found = []
    peaks = read_peaks()
    for model, folder in FOLDERS.items():
        runs, curves = (rows(RESULTS / folder / f"{name}.csv") for name in ("runs", "curves"))
        for task in dict.fromkeys(run["task"] for run in runs):
            own = [run for run in runs if run["task"] == task]
            points = [point for point in curves if point["task"] == task]
            study = Study(model, task, int(own[0]["steps"]), BATCH, 0, False, {})
            known = peaks.get(key(study), {})
            entries = [*_seven(own, points, model), *_likewise(model, task, own[0]["steps"])]
            found.append(Found(study, [_saving(one, known) for one in entries], None, "s"))
    return found


def read_peaks() -> dict[str, dict[str, int]]:
    """By model and task, then by the step's name; empty where nothing is measured."""
    if not PEAKS.is_file():
        return {}
    found: dict[str, dict[str, int]] = json.loads(PEAKS.read_text(encoding="utf-8"))["peaks"]
    return found


def _seven(runs: Rows, points: Rows, model: str) -> Iterator[Entry]:
    kind = BIASES if model == ENCODER else GAUSSIAN
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        results = [
            _result(run, [p for p in points if (p["method"], p["seed"]) == (method, run["seed"])])
            for run in own
        ]
        seconds = statistics.fmean(
            r["curve"][-1]["seconds"] / r["curve"][-1]["step"] for r in results
        )
        cost = {"passes": seconds, "peak_bytes": _peak(own)}
        yield Entry(_recipe(method, kind), results, False, {PLAIN: cost})


def _likewise(model: str, task: str, steps: str) -> Iterator[Entry]:
    """Full fine-tuning, and directions for each example, where they were run for as many steps."""
    for method, kind in kinds.methods(model, task):
        if method != "fo" and kind != "rank 1, per example":
            continue
        own = kinds.chosen(model, task, method, kind)
        if own[0]["steps"] != steps:
            continue
        cost = {"peak_bytes": _peak(own)}
        yield Entry(
            _recipe(method, PER_EXAMPLE), [_result(run, []) for run in own], False, {PLAIN: cost}
        )


def _recipe(method: str, kind: str) -> Recipe:
    first, _, adapter = method.partition("-")
    if method == "fo":
        return Recipe(ALL)
    return Recipe(FIRST[adapter], "" if first == "fo" else kind)


def _peak(runs: Sequence[dict[str, str]]) -> int:
    return max(int(run["peak_memory_bytes"]) for run in runs)


def _result(run: dict[str, str], points: Rows) -> Result:
    test: dict[str, Any] = {"loss": float(run["test_loss"])}
    if run["test_accuracy"]:
        test["accuracy"] = float(run["test_accuracy"])
    names = ("step", "seconds", "loss")
    curve = [{name: float(point[name]) for name in names} for point in points]
    return {"test": test, "curve": curve, "scored": "accuracy" in test}


def _saving(entry: Entry, peaks: dict[str, int]) -> Entry:
    """With the peaks of the steps that save memory."""
    more: dict[Saving, Any] = {
        saving: {"peak_bytes": peaks[name]}
        for saving in savings(entry.recipe)
        if (name := step_name(entry.recipe, saving)) in peaks
    }
    return Entry(entry.recipe, entry.runs, entry.at_an_end, {**entry.costs, **more})
