"""Tables of the grid: what each method reaches, takes and costs, and how adapters carry over."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zofo_optim.whole import write_json

from ..kept import finished
from ..report import Result, markdown, mean
from ..search import is_at_an_end
from . import costs, methods, variants
from .grid import LORA, PLUGGED, REFINED, ZO, Cell, cells
from .runs import Searches

ABOUT = """# Adapters of small models in a large one

- *small 3*: LoRA, and an encoder's head, trained by AdamW on a slice of 3 evenly spaced layers of
  the large model, carried over by `transfer_adapter` with its defaults. *bridge 3*: the same on
  `bridge_model(large, texts, layers=3)`, which chooses its layers, and gives them back.
- *small 3, scaled*: then the change of the weights times 0.5, 1, 2 or 4, by the development loss.
- *bridge 3 + ZO*: then all of the large model, the adapter and its head too, by zeroth order. The
  route was fixed before any run; the base's rate is that of *ZO*, the adapter's is searched.
- *ZO*: zeroth order alone, on all of the large model, an encoder's head too. Directions are of rank
  1, one for each example, two-sided.
- *LoRA*: by gradients on the large model: the bound. *probe*: no adapter; an encoder's head is a
  logistic regression of the same labels on its frozen features.

Rank 8 on queries and values. Means over seeds, ± sample deviation. A rate is searched on the first
seed by the development loss of the large model, on one grid, half a decade apart, from a start up
or down until the best one lies between others, in at most 5 runs: * where it does not; ' where it
is another method's. The first seed favours all a little. What trains is tested at its best
evaluation. Texts that activations are recorded of are the training examples without their labels.
Seconds are those of the process, on one thread. But for *LoRA*, nothing that touched the large
model saved a tensor for a backward: that would have been an error.
"""
STEPS = {LORA: LORA, ZO: ZO, REFINED: REFINED}
"""Which cost is that of a method's steps on the large model; others make forward passes alone."""
MEMORY = """Steps on the longest 16 rows. A transfer counts both models' weights, and rows of
activations of both, which lie on the CPU; where the large model is it takes *a forward pass*.
A bridge's adapter needs no text: rows only tell its errors.

"""


def table(searches: Searches, found: dict[Cell, list[Result]]) -> str:
    """A line a method."""
    measured = costs.read(searches)
    head = ["method", "rate", "test accuracy, %", "test loss", "dev. loss"]
    head += ["small model's accuracy, %", "peak MB", "where the large model is"]
    rows = [[*head, "seconds: small", "transfer", "on the large model"]]
    for cell, runs in found.items():
        line = [cell.name, _rate(searches, cell, runs)]
        line += [mean([run["test"]["accuracy"] for run in runs], 1, 100)]
        line += [mean([run[part]["loss"] for run in runs], 3) for part in ("test", "best")]
        smalls = [run["small"]["test"]["accuracy"] for run in runs if "small" in run]
        line += [mean(smalls, 1, 100) if smalls else "", *_memory(cell, measured)]
        rows.append([*line, *_seconds(runs)])
    return markdown(rows)


def _rate(searches: Searches, cell: Cell, runs: Sequence[Result]) -> str:
    if not cell.searched:
        rate = runs[0]["settings"]["lr"]
        scales = ", ".join(f"{run['scale']:g}" for run in runs if "scale" in run)
        return "" if rate is None else f"{rate:g}', times {scales}"
    return f"{runs[0]['settings']['lr']:g}" + "*" * is_at_an_end(searches.searched(cell))


def _memory(cell: Cell, measured: dict[str, int]) -> list[str]:
    """In all, and where the large model is; a transfer's rows and small model may be elsewhere."""
    there = measured.get(STEPS.get(cell.method, costs.FORWARD))
    source = cell if cell.method == PLUGGED else cell.adapter
    carried = 0 if source is None else measured.get(costs.rows(source, costs.TOKENS[0]))
    if there is None or carried is None:
        return ["", ""]
    return [f"{max(there, carried) / 1e6:.1f}", f"{there / 1e6:.1f}"]


def _seconds(runs: Sequence[Result]) -> list[str]:
    """Of the small model's training, the transfer, and the rest."""
    found = []
    for names in (("small",), ("transfer",), ("training", "zeroth order", "probe", "scales")):
        own = [sum(run["seconds"].get(name, 0.0) for name in names) for run in runs]
        found.append(f"{statistics.fmean(own):.0f}" if any(own) else "")
    return found


def errors(found: dict[Cell, list[Result]]) -> str:
    """Of the maps between activations, on held-out rows: a line for each route and module."""
    rows = [["adapter of", "small module", "large module", "input error", "output error"]]
    for cell, runs in found.items():
        if cell.method == PLUGGED:
            for row in runs[0]["report"]["rows"]:
                own = [row[f"{part}_error"] for part in ("input", "output")]
                line = [cell.name, f"`{row['small']}`", f"`{row['large']}`"]
                rows.append(line + ["" if error is None else f"{error:.2f}" for error in own])
    if len(rows) == 1:
        return ""
    about = "Of the maps between activations, as the report of a transfer tells them."
    return f"### Relative errors on held-out texts, seed 0\n\n{about}\n\n" + markdown(rows)


def compared(searches: Searches) -> str:
    """Variants: a line each, at the adapter's own scale and at the best one."""
    rows = [["adapter of", "layers, width", "dev. loss", "test loss", "test accuracy, %"]]
    rows[0] += ["head alone: test loss", "accuracy, %", "best scale", "test loss", "accuracy, %"]
    for cell, results in variants.read(searches).items():
        for name, result in results.items():
            own, none = result["scales"]["1"], result["scales"]["0"]
            scale = f"{methods.best_scale(result['scales']):g}"
            best = result["scales"][scale]
            line = [cell.name, name, f"{own['dev']['loss']:.3f}", *_test(own), *_test(none)]
            rows.append([*line, scale, *_test(best)])
    if len(rows) == 1:
        return ""
    return "### Other ways to carry them over, seed 0\n\n" + markdown(rows)


def _test(result: Result) -> list[str]:
    return [f"{result['test']['loss']:.3f}", f"{100 * result['test']['accuracy']:.1f}"]


def memory(searches: Searches) -> str:
    """All that was measured."""
    rows = [["what", "peak MB"]]
    rows += [[name, f"{size / 1e6:.1f}"] for name, size in costs.read(searches).items()]
    text = "### Memory: the most that live tensors take\n\n" + MEMORY
    return text + markdown(rows) if len(rows) > 1 else ""


def rates(searches: Searches, found: dict[Cell, list[Result]]) -> str:
    """Development losses of each searched run."""
    lines = ["### Searched: development loss by rate\n\n"]
    for cell in found:
        tried = [f"{k:g}: {run['best']['loss']:.3f}" for k, run in searches.searched(cell).items()]
        lines += [f"- {cell.name}: {', '.join(tried)}\n"] if tried else []
    return "".join(lines)


def section(searches: Searches, found: dict[Cell, list[Result]]) -> str:
    """Of a model and a task."""
    one = next(iter(found.values()))[0]
    study = searches.study
    parts = [
        f"## {searches.name}, {searches.task}\n",
        f"{study.steps} steps of {study.batch} examples, {round(study.longer * study.steps)} of "
        f"zeroth order; {one['test_examples']} test examples.\n",
        table(searches, found),
    ]
    more = [memory(searches), compared(searches), errors(found), rates(searches, found)]
    return "\n".join([*parts, *(text for text in more if text)])


def render(out: Path, searched: Sequence[Searches]) -> None:
    """Write ``table.md`` and ``table.json``."""
    sections, kept = [], []
    for searches in searched:
        found = finished(searches.results, cells(searches.study))
        if found:
            sections.append(section(searches, found))
            kept.append(_kept(searches, found))
    (out / "table.md").write_text("\n".join([ABOUT, *sections]), encoding="utf-8")
    write_json(out / "table.json", kept)


def _kept(searches: Searches, found: dict[Cell, list[Result]]) -> dict[str, Any]:
    """All runs, those of the searches too."""
    runs = [run for cell in found for run in searches.searched(cell).values()]
    runs += [run for results in found.values() for run in results if run not in runs]
    return {
        **{"model": searches.name, "task": searches.task, "runs": runs},
        **{"bytes": costs.read(searches)},
        "variants": [result for own in variants.read(searches).values() for result in own.values()],
    }
