"""What other studies say of methods that the grid does not have, each beside its own reference."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from ..report import markdown, mean
from . import kinds
from .runs import RESULTS

HEAD = ["method", "where", "measured", "it", "reference", "which is"]
NAMES = {
    "±1": "±1 directions",
    "rank 1": "one direction of rank 1 for all",
    "rank 1, per example": "one of rank 1 for each example",
    "rank 1, per example, normalized": "the same, normalized",
}


def table() -> str:
    studies = (_directions, _transfer, _sixteen_bit, _quantised, _populations)
    return markdown([HEAD, *(row for study in studies for row in study())])


def _quantised() -> list[list[str]]:
    """Scales of quantised bases, beside all weights in 16 bits."""
    found = json.loads((RESULTS / "quantized" / "table.json").read_text(encoding="utf-8"))
    where = {
        "stories260k": "stories260k, SST-2, 300 steps of 16",
        "all-minilm-l6-v2": "MiniLM, SST-2, 150 steps of 16",
    }
    return [
        [
            f"scales of {name.removesuffix(', ZO')}",
            where[model],
            "test loss",
            mean(cell["test_loss"], 3),
            mean(cells["bf16, ZO"]["test_loss"], 3),
            "zeroth order on all weights in bf16",
        ]
        for model, cells in found.items()
        for name, cell in cells.items()
        if name.endswith(", ZO") and not name.startswith("bf16")
    ]


def _directions() -> list[list[str]]:
    """Kinds of directions on the sentences, at their best rates."""
    losses = {
        kind: [
            float(run["test_loss"])
            for run in kinds.chosen("stories260k", "sst2-sentences", "zo", kind)
        ]
        for kind in ("Gaussian", *NAMES)
    }
    where, reference = "stories260k, sentences, 600 steps of 16", mean(losses["Gaussian"], 3)
    return [
        [name, where, "test loss", mean(losses[kind], 3), reference, "Gaussian directions"]
        for kind, name in NAMES.items()
    ]


def _transfer() -> list[list[str]]:
    """Carried adapters, where the large model is never differentiated."""
    parts: list[dict[str, Any]] = json.loads((RESULTS / "transfer/table.json").read_text())
    found = []
    for part in parts:
        scored = part["model"] != "stories260k"
        name, scale, digits = ("accuracy", 100, 1) if scored else ("loss", 1, 3)
        scores: dict[str, list[float]] = {}
        for method in ("bridge 3 + ZO", "LoRA"):
            by_rate: dict[float, list[float]] = {}
            for run in part["runs"]:
                if run["name"] == method:
                    rate = run["settings"]["lr"]
                    by_rate.setdefault(rate, []).append(run["test"][name])
            scores[method] = max(by_rate.values(), key=len)
        model = part["model"] if not scored else "MiniLM"
        found.append(
            [
                *("carried adapter, then zeroth order", f"{model}, {part['task']}"),
                "test accuracy, %" if scored else "test loss",
                mean(scores["bridge 3 + ZO"], digits, scale),
                mean(scores["LoRA"], digits, scale),
                "LoRA by gradients",
            ]
        )
    return found


def _sixteen_bit() -> list[list[str]]:
    """Weights in bf16 beside fp32, at each rate, in place."""
    content = json.loads((RESULTS / "sixteen-bit/language-model.json").read_text())
    found = []
    for rate, recipes in content["result"]["rates"].items():
        ends = {
            name: [seed["curve"][-1]["dev_loss"] for seed in recipes[name].values()]
            for name in ("fp32", "bf16 in place")
        }
        found.append(
            [
                *("weights in bf16, in place", f"stories260k, texts, rate {float(rate):g}"),
                *("development loss", mean(ends["bf16 in place"], 3)),
                *(mean(ends["fp32"], 3), "the same in fp32"),
            ]
        )
    return found


def _populations() -> list[list[str]]:
    """Antithetic pairs that share a pass, for scores that have no gradient."""
    runs = [
        run
        for run in kinds.rows(RESULTS / "rewards" / "runs.csv")
        if run["problem"] in ("style", "sentiment")
    ]
    found = []
    for problem in ("style", "sentiment"):
        own = [run for run in runs if run["problem"] == problem]
        ends = {
            method: _best_rate([run for run in own if run["method"] == method])
            for method in ("population, 64", "policy-gradient")
        }
        found.append(
            [
                *("antithetic pairs, a population of 64", f"stories260k, reward: {problem}"),
                *("reward at the end", mean(ends["population, 64"], 3)),
                *(mean(ends["policy-gradient"], 3), "the policy gradient"),
            ]
        )
    return found


def _best_rate(runs: Sequence[dict[str, str]]) -> list[float]:
    """Rewards at the end at the rate that has all seeds."""
    by_rate: dict[str, list[float]] = {}
    for run in runs:
        by_rate.setdefault(run["rate"], []).append(float(run["last_reward"]))
    return max(by_rate.values(), key=lambda values: (len(values), statistics.fmean(values)))
