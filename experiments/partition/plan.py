"""How long runs will take, by what steps have taken."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .grid import Cell
from .runs import Searches

TRIED = 3.4
"""Rates of a search, as a rule."""


def show(grid: Sequence[tuple[Searches, Sequence[Cell]]], console: Console) -> None:
    """A line a recipe, in the order of the runs: their number, seconds each, minutes until then."""
    table = Table(title="Planned, on one core", title_justify="left", box=SIMPLE_HEAD)
    for name in ("tier", "model", "recipe", "runs", "s a run", "minutes in all"):
        table.add_column(name, justify="left" if name in ("model", "recipe") else "right")
    lines = []
    for searches, cells in grid:
        evaluating = _evaluating(searches)
        for cell in cells:
            count = runs_of(cell, len(searches.seeds))
            seconds = searches.steps_of(cell) * searches.cost(cell.recipe)["seconds"] + evaluating
            lines.append((cell.tier, searches.name, cell.name, count, seconds))
    total, runs = 0.0, 0.0
    for tier, model, name, count, seconds in sorted(lines, key=lambda line: line[0]):
        total, runs = total + count * seconds, runs + count
        cost = (f"{count:g}", f"{seconds:.0f}", f"{total / 60:.1f}")
        table.add_row(str(tier), model, name, *cost)
    if not console.is_terminal:  # in a log, all of it
        console = Console(file=console.file, width=140)
    console.print(table)
    console.print(f"{runs:.0f} runs, {total / 60:.0f} minutes", highlight=False)


def runs_of(cell: Cell, seeds: int) -> float:
    """Of a cell: its search, which has the first seed's, and the other seeds."""
    return seeds - 1 + TRIED if cell.searched else float(seeds)


def _evaluating(searches: Searches) -> float:
    """Seconds of a run's evaluations."""
    problem = searches.problem
    began = time.process_time()
    problem.dev.score(problem.base)
    each = time.process_time() - began
    tests = each * len(problem.test) / len(problem.dev)
    return each * (searches.study.evaluations + 1) + tests
