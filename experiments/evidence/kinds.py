"""Committed runs of `experiments.directions`, at the rate that its rule chooses."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

from .runs import RESULTS

Rows = list[dict[str, str]]


def rows(path: Path) -> Rows:
    """Of a CSV file with a head."""
    with path.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


@cache
def _all(name: str) -> Rows:
    return rows(RESULTS / "directions" / f"{name}.csv")


def methods(model: str, task: str) -> list[tuple[str, str]]:
    """Methods and kinds of directions that were run."""
    own = [run for run in _all("runs") if (run["model"], run["task"]) == (model, task)]
    return list(dict.fromkeys((run["method"], run["directions"]) for run in own))


def chosen(model: str, task: str, method: str, kind: str) -> Rows:
    """One a seed: the lowest development loss on seed 0, where no seed ended above its start."""
    wanted = (model, task, method, kind)
    by_rate: dict[str, Rows] = {}
    for run in _all("runs"):
        if (run["model"], run["task"], run["method"], run["directions"]) == wanted:
            by_rate.setdefault(run["rate"], []).append(run)
    seeds = max(map(len, by_rate.values()))
    sound = [own for own in by_rate.values() if len(own) == seeds and not any(map(_diverged, own))]
    return min(sound, key=lambda own: float(own[0]["dev_loss"]))


def _diverged(run: dict[str, str]) -> bool:
    names = ("model", "task", "method", "directions", "rate", "seed")
    own = [p for p in _all("curves") if all(p[name] == run[name] for name in names)]
    return not float(own[-1]["loss"]) <= float(own[0]["loss"])
