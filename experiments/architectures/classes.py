"""The classes of the installed transformers: those of the mappings of its auto classes, and others
whose names tell a task."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from .tasks import TASKS, UNLISTED


class Case(NamedTuple):
    """A class of a task, and the kind of model whose configuration makes it."""

    name: str
    task: str
    model_type: str


def all_cases() -> dict[str, Case]:
    """Every distinct class that has a task of `TASKS`, by its name, in their order."""
    found: dict[str, Case] = {}
    for task in TASKS:
        for model_type, name in _listed(task):
            known = found.get(name)
            if known is None or (known.task, task) == ("causal_lm", "image_text_to_text"):
                found[name] = Case(name, task, model_type)
    for kind, name in _unlisted():
        if name not in found:
            task = next(t for t in TASKS if re.fullmatch(TASKS[t].unlisted, name))
            found[name] = Case(name, task, kind)
    return found


def _listed(task: str) -> Iterator[tuple[str, str]]:
    for mapping in TASKS[task].mappings:
        pairs = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        for model_type, names in pairs.items():
            for name in [names] if isinstance(names, str) else names:
                if model_type in CONFIG_MAPPING:
                    yield model_type, name


def _unlisted() -> Iterator[tuple[str, str]]:
    """Of every module of models: its folder's name, and a class's. No module is imported."""
    for name, module in sorted(vars(transformers)["_class_to_module"].items()):
        folder, _, _ = module.partition(".modeling_")
        if folder not in (module, "models.auto") and UNLISTED.fullmatch(name):
            yield folder.removeprefix("models."), name


def class_of(case: Case) -> Any:
    """The class itself; its module is imported."""
    return getattr(transformers, case.name)
