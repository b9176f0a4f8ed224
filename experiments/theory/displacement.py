"""How long the displacement of a finite difference may be: Hessian norms over its length.

Ma, Yu, Huang 2026 (App. D.4) take 1e-5 along a unit vector. In d dimensions that moves a weight by
1e-5/√d, which 32 bits may round away.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from zofo_optim.smoothness import measure_smoothness

from ..finetune import model_name
from ..partition.problems import batches
from ..plots import finish, panels
from ..report import markdown
from .numbers import short, with_error
from .options import TheoryOptions
from .studies import chosen
from .trajectory import blocks_of, closure_of, problem_of

LENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PAPER = 1e-5
VECTORS = 10


def measure(options: TheoryOptions, console: Console) -> dict[str, Any]:
    """‖H‖_F of base and adapter (LoRA) at the start, by length, and by double backward."""
    found: dict[str, Any] = {}
    for model, study in chosen(options):
        problem = problem_of(options, model, study)
        seed = options.seeds[0]
        module, blocks = blocks_of(problem, "hybrid-lora", seed)
        closure = closure_of(problem, module, next(batches(problem, options.batch_size, seed)))
        common: dict[str, Any] = dict(directions=options.vectors or VECTORS, largest=False)
        exact = measure_smoothness(blocks, closure, method="exact", **common)
        norms: dict[str, list[float]] = {name: [] for name in blocks}
        for length in LENGTHS:
            some = measure_smoothness(blocks, closure, step=length, **common)
            for name, block in some.items():
                norms[name].append(block.frobenius)
        name = f"{model_name(model)}, {study.task}"
        console.print(f"{name}: {len(LENGTHS)} lengths", highlight=False)
        found[name] = {
            block: {
                "parameters": exact[block].parameters,
                "exact": exact[block].frobenius,
                "error": exact[block].frobenius_error,
                "norms": norms[block],
            }
            for block in blocks
        }
    return {"lengths": list(LENGTHS), "models": found}


def table(content: dict[str, Any]) -> str:
    result = content["result"]
    rows = [["model, task", "block", "double backward", *map(_power, result["lengths"])]]
    for name, blocks in result["models"].items():
        for block, one in blocks.items():
            norms = [short(norm / one["exact"]) for norm in one["norms"]]
            rows.append([name, block, with_error(one["exact"], one["error"]), *norms])
    return (
        "‖H‖_F at the start, LoRA, one batch: by double backward, ± standard error over "
        f"{content['settings']['vectors'] or VECTORS} vectors; by differences of gradients in fp32 "
        f"over it, along the same vectors, by length of the displacement.\n\n{markdown(rows)}"
    )


def _power(length: float) -> str:
    return f"{length:.0e}".replace("e-0", "e-").replace("1e+00", "1")


def plot(path: Path, content: dict[str, Any]) -> None:
    result = content["result"]
    figure, axes = panels(len(result["models"]))
    for axis, (name, blocks) in zip(axes, result["models"].items(), strict=True):
        for block, one in blocks.items():
            shares = [norm / one["exact"] for norm in one["norms"]]
            label = f"{block}, d = 10^{math.log10(one['parameters']):.1f}"
            axis.loglog(result["lengths"], shares, "o-", markersize=4, label=label)
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.axvline(PAPER, color="#999999", linewidth=0.8, linestyle=":")
        axis.set(title=name, xlabel="length of the displacement; dotted: the paper's")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("‖H‖_F over that by double backward")
    finish(figure, "Finite differences of gradients in fp32", path)
