"""How updates of quantised weights are kept: a comparison in which all else is equal.

    python -m experiments.quantized.updates --model path/to/stories260k --out runs/quantized

Zeroth order alone trains the linear layers of a causal language model whose weights are on
torchao's grid; all else stays. Every way of updating (`WAYS`) has the same batches and steps. Their
rates count in the same units, so that all run at the dense one's, with `--search` at the best of
three (of seed 0); scales have rates of their own, which are searched always. `OUT/updates.json`
receives what was found, and runs that are there are not made again; `OUT/updates.md` is its table.

Needs, in a checkout: pip install -e ".[experiments]", and torchao
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from zofo_optim import HybridZOFO, add_side_updates, hybrid_param_groups
from zofo_optim.whole import write_json

from ..classification import Batch
from ..commands import ended, quiet_on_one_thread
from ..finetune import versions
from ..forms import FORMS
from ..models import Problem, load_problem
from ..tasks import default_source, protocol
from ..training import LOSS_EXAMPLES
from .grids import quantise, taken_apart
from .rules import Layer, Way, all_displaced

MU, STEPS, BATCH = 1e-3, 300, 8
SEEDS = (0, 1, 2)
RATES = (1e-4, 5e-5, 2e-4)
"""The first one is the best of dense updates."""
SCALE_RATES = (4e-3, 1e-3, 1.6e-2)
"""Of scales, which count in units of their own size."""


def _side(rank: int, redraw: int) -> tuple[str, Way]:
    when = f"V anew every {redraw}" if redraw > 1 else "V anew each step" if redraw else "V stays"
    return f"side, rank {rank}, {when}", Way(rank=rank, redraw=redraw)


_PER_EXAMPLE = Way(per_example=True)
WAYS: dict[str, Way] = {
    "dense": Way(),
    "the library's, rank 16": Way("library", rank=16, redraw=0),
    "the library's, rank 4": Way("library", rank=4, redraw=0),
    "rounded": Way("rounded"),
    "scales": Way("scales"),
    **dict(_side(rank, redraw) for rank in (1, 4, 16) for redraw in (0, 100, 25, 1)),
    "folded at 32": Way("folded", cap=32),
    "dense, per example": _PER_EXAMPLE,
    "side, rank 16, V stays, per example": replace(_PER_EXAMPLE, rank=16, redraw=0),
    "side, rank 4, V stays, per example": replace(_PER_EXAMPLE, rank=4, redraw=0),
    "rounded, per example": replace(_PER_EXAMPLE, kept="rounded"),
    "folded at 32, per example": replace(_PER_EXAMPLE, kept="folded", cap=32),
}
"""`dense` updates what the weights stand for, which no quantised weight can: an upper bound."""
IN_8_BITS = ["dense", "the library's, rank 16", "side, rank 16, V stays", "rounded", "scales"]
TASK = "sst2-sentences"
CELLS = [(TASK, 4, list(WAYS)), (TASK, 8, IN_8_BITS)]
"""Task, bits and ways."""


def run(problem: Problem, bits: int, way: Way, rate: float, seed: int) -> dict[str, float]:
    """Losses before and after; of the first training examples and of the development set."""
    torch.manual_seed(seed)
    base: Any = copy.deepcopy(problem.base)
    model = base.requires_grad_(False).eval()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    ]
    quantise(model, bits, names)
    by_the_library = way.kept == "library"
    step = (_of_the_library if by_the_library else _simulated)(
        problem, model, names, bits, way, seed
    )

    def losses() -> tuple[float, float]:
        return problem.dev.mean_loss(model), problem.train.mean_loss(model, LOSS_EXAMPLES)

    order = torch.Generator().manual_seed(seed)
    start = losses()
    for number in range(STEPS):
        chosen = torch.randperm(len(problem.train), generator=order)[:BATCH].tolist()
        step(number, problem.train.batch(chosen), rate * (1 - number / STEPS))
    end = losses()
    return {"dev_start": start[0], "train_start": start[1], "dev": end[0], "train": end[1]}


Step = Callable[[int, Batch, float], object]
"""Makes a step, given its number, its batch and its rate."""


def _simulated(
    problem: Problem, model: nn.Module, names: list[str], bits: int, way: Way, seed: int
) -> Step:
    generator = torch.Generator().manual_seed(1000 + seed)
    grids = taken_apart(model, bits, names)
    layers = [Layer(model.get_submodule(name), grids[name], way, generator) for name in names]

    @torch.no_grad()
    def step(number: int, batch: Batch, rate: float) -> None:
        for layer in layers:
            layer.draw(number, BATCH)
        sides: list[Tensor] = []
        for mu in (MU, -MU):
            with all_displaced(layers, mu):
                sides.append(problem.train.losses(model, batch))
        slopes = (sides[0] - sides[1]) / (2 * MU)
        if bool(slopes.isfinite().all()):
            for layer in layers:
                layer.update(slopes, rate)

    return step


def _of_the_library(
    problem: Problem, model: nn.Module, names: list[str], bits: int, way: Way, seed: int
) -> Step:
    add_side_updates(model, rank=way.rank, seed=seed)
    zo = dict(lr=0.0, mu=MU)
    groups = hybrid_param_groups(
        model, zo, include="side_update", quantized="low_rank", verbose=False
    )
    optimizer = HybridZOFO(groups, seed=seed)

    def step(number: int, batch: Batch, rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step(lambda: problem.train.losses(model, batch).mean())

    return step


def _rank(result: dict[str, float]) -> float:
    return result["dev"] if math.isfinite(result["dev"]) else math.inf


class Runs:
    """Makes runs that are not in a file yet, and writes it after each.

    Args:
        model: folder.
        out: folder of `updates.json`.
    """

    def __init__(self, model: str, out: Path) -> None:
        self._model, self._file = model, out / "updates.json"
        out.mkdir(parents=True, exist_ok=True)
        self._problems: dict[str, Problem] = {}
        self.found: dict[str, Any] = {"settings": {}, "runs": {}}
        if self._file.is_file():
            self.found = json.loads(self._file.read_text(encoding="utf-8"))
        self.found["settings"] = {
            **{"mu": MU, "steps": STEPS, "batch": BATCH, "model": Path(model).name},
            "versions": versions(),
        }

    def once(self, task: str, bits: int, name: str, rate: float, seed: int) -> dict[str, float]:
        """The result of a run."""
        runs = self.found["runs"].setdefault(f"{task}, int{bits}", {}).setdefault(name, {})
        key = f"{rate:g}, seed {seed}"
        if key not in runs:
            runs[key] = run(self._problem(task), bits, WAYS[name], rate, seed)
            write_json(self._file, self.found)
        result: dict[str, float] = runs[key]
        return result

    def _problem(self, task: str) -> Problem:
        if task not in self._problems:
            rows = protocol(task, default_source(task), 0)
            self._problems[task] = load_problem(
                self._model, FORMS[task], rows, dtype=torch.float32, device=torch.device("cpu")
            )
        return self._problems[task]


def study(model: str, out: Path, searching: bool, console: Console) -> None:
    """All cells."""
    runs = Runs(model, out)
    for task, bits, names in CELLS:
        for name in names:
            of_scales = WAYS[name].kept == "scales"
            rates = SCALE_RATES if of_scales else RATES if searching else RATES[:1]
            tried = {rate: _rank(runs.once(task, bits, name, rate, SEEDS[0])) for rate in rates}
            best = min(tried, key=tried.__getitem__)
            for seed in SEEDS:
                runs.once(task, bits, name, best, seed)
            console.print(f"{task}, int{bits}: {name}, {best:g}", highlight=False)
    (out / "updates.md").write_text(table(runs.found), encoding="utf-8")


def table(found: dict[str, Any]) -> str:
    """Ways that have all seeds at some rate: losses on the training examples at the best one."""
    lines = ["| weights | updates | rate | training loss | development loss |", "|" + "---|" * 5]
    for place, ways in found["runs"].items():
        for name in (name for name in WAYS if name in ways):
            runs = ways[name]
            at: dict[str, list[dict[str, float]]] = {}
            for key, result in runs.items():
                at.setdefault(key.split(",")[0], []).append(result)
            whole = {rate: seeds for rate, seeds in at.items() if len(seeds) == len(SEEDS)}
            if whole:
                rate = min(whole, key=lambda rate: statistics.mean(map(_rank, whole[rate])))
                cells = (_mean_of(whole[rate], part) for part in ("train", "dev"))
                lines.append(f"| {place} | {name} | {rate} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_of(results: list[dict[str, float]], part: str) -> str:
    values = [result[part] for result in results]
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.quantized.updates",
        description="Compare how zeroth-order updates of quantised weights are kept.",
    )
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--out", type=Path, default=Path("runs/quantized"), help="folder")
    parser.add_argument("--search", action="store_true", help="try other rates of each way too")
    options = parser.parse_args(argv)
    quiet_on_one_thread()
    console = Console()
    return ended(
        *(parser, console, lambda: study(options.model, options.out, options.search, console)),
        f"Results: {options.out / 'updates.json'}",
    )


if __name__ == "__main__":
    raise SystemExit(main())
