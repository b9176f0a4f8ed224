"""Making the runs, by the searches of `partition/`, and taking committed ones over."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from zofo_optim.whole import strict, whole

from ..files import DataError
from ..models import DEFAULT_MODEL_PACKAGE
from ..partition.grid import Study
from ..partition.problems import Sizes
from ..partition.runs import Searches
from ..report import Result
from ..studies import folder_of
from .grid import ENCODER, STUDIES

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).resolve().parents[1] / "results"
COMMITTED = RESULTS / "evidence" / "runs.json"
OTHERS = RESULTS / "partition" / "runs.json"
"""Runs of the same protocol that another study made."""
DROPPED = ("fo_tensors", "predicted")
"""Of a run's result, what the page does not need."""


def model_of(study: Study) -> str:
    """The package, or the folder below the one that ZOFO_DATA names."""
    if study.model == ENCODER:
        return DEFAULT_MODEL_PACKAGE
    return str(Path(os.environ.get("ZOFO_DATA", "")).resolve() / "models" / study.model)


def searches(
    study: Study,
    out: Path,
    *,
    made: bool,
    sizes: Sizes | None = None,
    console: Console | None = None,
) -> Searches:
    """Of a model and task, in a folder of their own.

    Args:
        made: what is not there is made; else it is :class:`experiments.kept.Unfinished`.
        sizes: numbers of examples; default: those of `partition/`.

    Raises:
        DataError: runs are to be made, and ZOFO_DATA is not set.
    """
    data = os.environ.get("ZOFO_DATA")
    if made and not data:
        raise DataError(
            "ZOFO_DATA must name the folder with models/stories260k and the tasks' data, "
            "got nothing"
        )
    return Searches(
        study,
        model_of(study),
        out / study.task,
        SEEDS,
        data=data if made else None,
        sizes=sizes,
        console=console,
    )


def committed(files: Iterable[Path] = (OTHERS, COMMITTED)) -> list[Result]:
    """All runs in the files that are there; numbers that were not finite are NaN again."""
    return [
        {name: value if name == "settings" else _as_numbers(value) for name, value in run.items()}
        for file in files
        if file.is_file()
        for part in json.loads(file.read_text(encoding="utf-8"))
        for run in part["runs"]
    ]


def _as_numbers(value: Any) -> Any:
    """NaN in place of None, which only settings have of their own."""
    if isinstance(value, dict):
        return {name: _as_numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_as_numbers(one) for one in value]
    return math.nan if value is None else value


def restore(runs: Iterable[Result], out: Path) -> None:
    """Lay runs where the searches look for them, but where there are some already."""
    for run in runs:
        file = out / _place(run)
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(run) + "\n", encoding="utf-8")


def _place(run: Result) -> Path:
    given = run["settings"]
    rates = (given[name] for name in ("lr_fo", "lr_zo"))
    folder = Path(given["task"], given["model"], given["task"], folder_of(run["name"]))
    rate = "-".join(f"{one:g}" for one in rates if one is not None)
    return folder / rate / f"seed-{given['seed']}.json"


def collect(out: Path, known: Sequence[Result]) -> list[dict[str, Any]]:
    """By model and task, all runs in the folder that are not known already."""
    there = {_place(run) for run in known}
    parts = []
    for study in STUDIES:
        below = Path(study.task, study.model)
        files = sorted((out / below).glob("*/*/*/seed-*.json"))
        runs = [
            json.loads(file.read_text(encoding="utf-8"))
            for file in files
            if file.relative_to(out) not in there
        ]
        kept = [{k: v for k, v in run.items() if k not in DROPPED} for run in runs]
        if kept:
            parts.append({"model": study.model, "task": study.task, "runs": kept})
    return parts


def store(parts: Sequence[dict[str, Any]], file: Path) -> None:
    """A line a run, so that a later run changes few lines; numbers that are not finite are null."""
    blocks = []
    for part in parts:
        lines = ",\n".join(json.dumps(strict(run), allow_nan=False) for run in part["runs"])
        head = json.dumps({"model": part["model"], "task": part["task"]})[:-1]
        blocks.append(f'{head}, "runs": [\n{lines}\n]}}')
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as fresh:
        fresh.write_text("[" + ",\n".join(blocks) + "]\n", encoding="utf-8")
