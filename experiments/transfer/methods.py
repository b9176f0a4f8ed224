"""Each method once: what it does, its scores, and the seconds of the process on one thread."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from zofo_optim.transfer import TransferReport

from ..classification import Batch
from ..heads import BATCH, fit_probe
from ..models import Problem
from ..partition.loop import train
from ..report import Result
from .grid import Study
from .guard import no_graph
from .large import plug, zeroth_order
from .small import lora, plain_copy

SCALES = (0.5, 1.0, 2.0, 4.0)
"""Of the change that an adapter makes, tried on the development examples."""


def scored(problem: Problem, model: nn.Module) -> Result:
    """Of a model that does not change any more: ``best`` on the development examples, ``test``."""
    found = problem.dev.score(model)
    best = {"step": 0, "loss": found.loss, "accuracy": found.accuracy}
    return {"best": best, **_tested(problem, model)}


def _tested(problem: Problem, model: nn.Module) -> Result:
    return {"test": asdict(problem.test.score(model)), "test_examples": len(problem.test)}


def untrained(problem: Problem) -> Result:
    """As it came, an encoder with its first head."""
    model = plain_copy(problem)
    with no_graph(model):
        return {**scored(problem, model), "seconds": {}}


def probed(problem: Problem) -> Result:
    """Under a logistic regression of the training labels: what the frozen features offer."""
    model = plain_copy(problem)
    began = time.process_time()
    with no_graph(model):
        fit_probe(model, problem.train.fixed_batches(BATCH))  # type: ignore[attr-defined]
        seconds = time.process_time() - began
        return {**scored(problem, model), "seconds": {"probe": seconds}}


def by_gradients(problem: Problem, study: Study, lr: float, seed: int) -> tuple[nn.Module, Result]:
    """LoRA, and a head, trained by AdamW: of the large model, or of a small one."""
    setup = lora(problem, lr, seed)
    found = train(
        problem,
        setup,
        seed=seed,
        steps=study.steps,
        batch=study.batch,
        evaluations=study.evaluations,
    )
    found["seconds"] = {"training": found["curve"][-1]["seconds"]}
    return setup.model, {**found, **_tested(problem, setup.model)}


def transferred(
    problem: Problem, small: nn.Module, texts: Sequence[Batch]
) -> tuple[nn.Module, Result]:
    """The large model with the adapter of a small one, as it is."""
    plugged = plug(problem, small, texts)
    with no_graph(plugged.model):
        found = scored(problem, plugged.model)
    return plugged.model, {
        **found,
        "report": told(plugged.report),
        "seconds": {"transfer": plugged.seconds},
    }


def scales(problem: Problem, model: nn.Module, some: Sequence[float]) -> dict[str, Result]:
    """Development scores with the change of the weights at each scale; test scores of some.

    Those without the change, with it as it is, and at the best scale. The model is left as it was.
    """
    found: dict[str, Result] = {}
    parts = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    kept = {name: part.clone() for name, part in parts.items()}

    @torch.no_grad()
    def change(scale: float) -> None:
        for name, part in parts.items():
            part.copy_(scale * kept[name])

    with no_graph(model):
        for scale in some:
            change(scale)
            found[f"{scale:g}"] = {"dev": asdict(problem.dev.score(model))}
        for scale in {0.0, 1.0, best_scale(found)}.intersection(some):
            change(scale)
            found[f"{scale:g}"]["test"] = asdict(problem.test.score(model))
        change(1.0)
    return found


def best_scale(found: Mapping[str, Result]) -> float:
    """That with the lowest development loss."""
    return float(min(found, key=lambda scale: found[scale]["dev"]["loss"]))


def scaled(problem: Problem, model: nn.Module) -> Result:
    """With the change of the weights at the scale of :data:`SCALES` with the best dev. loss."""
    began = time.process_time()
    found = scales(problem, model, SCALES)
    seconds = time.process_time() - began
    best = best_scale(found)
    dev = found[f"{best:g}"]["dev"]
    return {
        "best": {"step": 0, "loss": dev["loss"], "accuracy": dev["accuracy"]},
        "test": found[f"{best:g}"]["test"],
        "test_examples": len(problem.test),
        "scale": best,
        "scales": {scale: one["dev"] for scale, one in found.items()},
        "seconds": {"scales": seconds},
    }


def by_forwards(
    problem: Problem,
    study: Study,
    model: nn.Module,
    base: float,
    adapter: float | None,
    seed: int,
) -> Result:
    """All of a model trained by zeroth order, see :func:`large.zeroth_order`."""
    setup = zeroth_order(problem, model, base, adapter, seed)
    with no_graph(model):
        found = train(
            problem,
            setup,
            seed=seed,
            steps=round(study.longer * study.steps),
            batch=study.batch,
            evaluations=study.evaluations,
        )
        found["seconds"] = {"zeroth order": found["curve"][-1]["seconds"]}
        return {**found, **_tested(problem, model)}


def told(report: TransferReport) -> dict[str, Any]:
    """The report in JSON; errors are relative."""
    rows = [asdict(row) for row in report.rows]
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[name] = None
    return {"layers": {str(k): v for k, v in report.layers.items()}, "rows": rows}
