"""What is done with one class."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch

from .building import NotBuilt, build, own_loss
from .checks import run_checks
from .classes import Case


def examine(case: Case) -> dict[str, Any]:
    """Build the class tiny and check steps of it.

    Returns:
        ``task``, ``model_type``, ``seconds``; and ``not_built`` with the reason, or ``parameters``
        and what :func:`run_checks` returns.
    """
    started = time.perf_counter()
    result: dict[str, Any] = {"task": case.task, "model_type": case.model_type}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, batch = build(case)
        except NotBuilt as error:
            result["not_built"] = str(error)
        else:
            result["parameters"] = sum(p.numel() for p in model.parameters())
            result["inputs"] = sorted(key for key in batch if "label" not in key)
            with torch.no_grad():
                result["own_loss"] = own_loss(model(**batch)) is not None
            result |= run_checks(model, batch)
    result["seconds"] = round(time.perf_counter() - started, 2)
    return result
