"""The table: what each format and method reaches, beside the run in 16 bits."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from zofo_optim.whole import write_json

from ..kept import finished
from ..report import Result, markdown, mean
from ..search import is_at_an_end
from .grid import Cell, cells
from .runs import Searches

ABOUT = """# Quantised bases

SST-2, batches of 16, two-sided along one Gaussian direction for all examples, in place. *ZO*:
zeroth order alone; of a quantised base its scales learn, of one in 16 bits all weights. *LoRA*: by
AdamW on the base as it is (of rank 8; an encoder's head too). *hybrid LoRA*: both, LoRA at the rate
that was best for it alone. Means over seeds, ± sample deviation. Rates are searched on the first
seed by the development loss, half a decade apart, from a start up or down until the best one lies
between others, in at most 5 runs: * where it does not. Rates of scales count in their sizes. The
weights of the best evaluation are tested. Seconds are those of the process, on one thread of a
processor on which formats have no fast kernels.
"""


def table(searches: Searches, found: dict[Cell, list[Result]]) -> str:
    """A line a cell."""
    rows = [["base", "method", "rate", "what learns", "test loss", "test accuracy, %", "dev. loss"]]
    rows[0] += ["ms a step"]
    for cell, runs in sorted(found.items(), key=lambda item: _order(item[0])):
        rate = runs[0]["settings"]["lr"]
        ended = bool(cell.searched) and is_at_an_end(searches.searched(cell))
        line = [cell.format, cell.method, "" if rate is None else f"{rate:g}" + "*" * ended]
        line += [_learns(runs[0])]
        line += [mean([run["test"]["loss"] for run in runs], 3)]
        line += [mean([run["test"]["accuracy"] for run in runs], 1, 100)]
        rows.append([*line, mean([run["best"]["loss"] for run in runs], 3), _step(runs)])
    return markdown(rows)


def _order(cell: Cell) -> tuple[int, int]:
    every = cells()
    methods = list(dict.fromkeys(one.method for one in every))
    formats = list(dict.fromkeys(one.format for one in every))
    return methods.index(cell.method), formats.index(cell.format)


def _learns(run: Result) -> str:
    sizes = [run.get("parameters_zo", 0), run.get("parameters_fo", 0)]
    named = zip(sizes, ("zeroth order", "first order"), strict=True)
    return ", ".join(f"{size:,} by {kind}" for size, kind in named if size)


def _step(runs: Sequence[Result]) -> str:
    own = [
        1000 * run["curve"][-1]["seconds"] / run["curve"][-1]["step"]
        for run in runs
        if "curve" in run
    ]
    return f"{statistics.fmean(own):.0f}" if own else ""


def render(out: Path, every: Sequence[Searches]) -> None:
    """Write ``table.md`` and ``table.json``."""
    parts, tables = [ABOUT], {}
    for searches in every:
        found = finished(searches.results, cells())
        if found:
            parts.append(f"## {searches.name}\n\n{table(searches, found)}")
            tables[searches.name] = {
                cell.name: {
                    "test_loss": [run["test"]["loss"] for run in runs],
                    "test_accuracy": [run["test"]["accuracy"] for run in runs],
                    "dev_loss": [run["best"]["loss"] for run in runs],
                    "rate": runs[0]["settings"]["lr"],
                }
                for cell, runs in found.items()
            }
    (out / "table.md").write_text("\n".join(parts), encoding="utf-8")
    write_json(out / "table.json", tables)
