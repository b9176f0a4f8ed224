"""Smoothness over the gradient's norm, along runs: what Definition 2.1 bounds.

Of Ma, Yu, Huang 2026: the Hessian's block of base and of adapter is at most l(‖∇f‖), with l of its
own. The pairs are those of points of runs, each of the batch that is trained on there; the curves
are ``fit_hybrid_smoothness``'s.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from zofo_optim.smoothness import HybridSmoothness, fit_hybrid_smoothness, plot_scatter

from ..finetune import model_name
from ..report import markdown
from ..training import RunError
from .numbers import short, with_error
from .options import TheoryOptions
from .studies import chosen
from .trajectory import Row, places, planned, problem_of, rows_of

METHOD = "hybrid-lora"
VECTORS = 2
"""Only eigenvalues are shown."""
LEAST = 4
"""Points that a fit needs."""


def measure(options: TheoryOptions, console: Console) -> dict[str, Any]:
    """Pairs and fits by model and task, and by block."""
    found: dict[str, Any] = {}
    seeds = dict.fromkeys(options.seeds)
    for model, study in chosen(options):
        if study.scattered == 0:
            continue
        length, points = options.steps or study.length, options.points or study.scattered
        if (there := len(seeds) * len(places(length, points))) < LEAST:
            raise RunError(
                f"--points and --seeds must give at least {LEAST} points, got {there} "
                f"(in {length} steps)"
            )
        rows: list[Row] = []
        for seed in seeds:
            plan = planned(
                *(options, model, study, METHOD, seed),
                points=study.scattered,
                vectors=VECTORS,
                blocks=("base", "adapter"),
            )
            name = f"{model_name(model)}-{study.task}-{seed}.json"
            rows += [
                {**row, "seed": seed}
                for row in rows_of(
                    plan,
                    options.out / "runs" / "scatter" / name,
                    partial(problem_of, options, model, study),
                    console,
                )
            ]
        later = pairs_of([row for row in rows if row["step"] > 0])
        found[f"{model_name(model)}, {study.task}"] = {
            block: {
                "points": pairs,
                "fit": asdict(fit_hybrid_smoothness(*pairs)),
                "correlation": log_correlation(*pairs),
                "correlation after the start": log_correlation(*later[block]),
            }
            for block, pairs in pairs_of(rows).items()
        }
    return found


def pairs_of(rows: Sequence[Row]) -> dict[str, tuple[list[float], list[float]]]:
    """By block: norms of the whole gradient, and magnitudes of largest eigenvalues, where found."""
    whole: dict[tuple[int, int], float] = {}
    for row in rows:
        key = (row["seed"], row["step"])
        whole[key] = math.hypot(whole.get(key, 0.0), row["gradient_norm"])
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in (row for row in rows if row["largest"] is not None):
        norms, curvatures = found.setdefault(row["block"], ([], []))
        norms.append(whole[row["seed"], row["step"]])
        curvatures.append(abs(row["largest"]))
    return found


def table(content: dict[str, Any]) -> str:
    head = ["model, task", "block", "points", "‖∇f‖ from", "to", "L0", "L1", "exponent", "bound"]
    rows = [[*head, "correlation", "after the start"]]
    for name, blocks in content["result"].items():
        for block, one in blocks.items():
            norms = one["points"][0]
            fit = one["fit"]
            shown = [
                with_error(fit[part], fit[f"{part}_error"])
                for part in ("constant", "slope", "exponent")
            ]
            ends = [short(end(norms)) for end in (min, max)]
            correlations = [one[k] for k in ("correlation", "correlation after the start")]
            cells = [str(fit["points"]), *ends, *shown, f"{fit['factor']:.2g} l"]
            cells += [f"{correlation:.2f}" for correlation in correlations]
            rows.append([name, block, *cells])
    return (
        "l(t) = L0 + L1 t^exponent, fitted to largest eigenvalues over norms of the whole gradient "
        "by least squares, ± standard errors that take points as independent; no point is above "
        f"the bound. Correlations are of logarithms.\n\n{markdown(rows)}"
    )


def log_correlation(norms: Sequence[float], curvatures: Sequence[float]) -> float:
    """Pearson's, of the logarithms."""
    return statistics.correlation(*([math.log(v) for v in some] for some in (norms, curvatures)))


def plot(path: Path, content: dict[str, Any]) -> None:
    """A file a model and task."""
    for name, blocks in content["result"].items():
        points = {block: tuple(one["points"]) for block, one in blocks.items()}
        fits = {block: HybridSmoothness(**one["fit"]) for block, one in blocks.items()}
        file = f"{path.stem}-{name.replace(', ', '-')}.png"
        plot_scatter(points, path.with_name(file), fits)
