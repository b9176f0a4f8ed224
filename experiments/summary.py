"""What is printed of one task's runs: a table, what its columns and first row mean, a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .report import Result, cells, quantity, start

PEAK = (
    "peak MB: the most that tensors (weights, gradients, optimizer state, activations) take at one "
    "moment of a step on the longest rows."
)
PROBE = "fitted probe"
PROBE_LEGEND = (
    f"{PROBE}: the base model as it came, under a logistic regression fitted on the training "
    "examples and their labels. All methods start from it."
)


def print_table(console: Console, results: Sequence[Result], title: str) -> None:
    """The comparison of one task's methods, a line each, their start, and a verdict."""
    grid = cells(results)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for column in ("test\naccuracy, %", "test\nloss", "training\nloss", "\nsteps", "\ns/step"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("peak\nMB", justify="right", no_wrap=True)
    untrained, begin = untrained_scores(results), start_name(results)
    if untrained is not None:
        accuracy = f"{100 * untrained['accuracy']:.1f}" if results[0]["scored"] else ""
        loss = f"{untrained['loss']:.3f}"
        table.add_row(begin, accuracy, loss, start(grid, results[0]["task"], "train_loss"))
    for (_, method), runs in grid.items():
        table.add_row(
            method,
            quantity(runs, "accuracy") if runs[0]["scored"] else "",
            quantity(runs, "loss"),
            quantity(runs, "train_loss"),
            f"{statistics.fmean(r['steps'] for r in runs):g}",
            f"{statistics.fmean(r['seconds_per_step'] for r in runs):.3f}",
            f"{max(r['peak_memory_bytes'] for r in runs) / 1e6:,.0f}",
        )
    if not console.is_terminal:  # in a log, all of it
        console = Console(file=console.file, width=140)
    console.print(table)
    console.print(PEAK, highlight=False, soft_wrap=True)
    if untrained is not None and begin == PROBE:
        console.print(PROBE_LEGEND, highlight=False, soft_wrap=True)
    for result in results:
        if not math.isfinite(result["curve"][-1]["train_loss"]) or result["skipped_steps"]:
            console.print(
                f"{result['method']}, seed {result['seed']}: training loss "
                f"{result['curve'][-1]['train_loss']:.3f} at the end, {result['skipped_steps']} "
                "estimates were not finite"
            )
    console.print(verdict(results), highlight=False, soft_wrap=True)


def untrained_scores(results: Sequence[Result]) -> dict[str, float] | None:
    """Test scores of the untrained model; None: the results are of a time that had none."""
    found: list[dict[str, float]] = [r["untrained"] for r in results if "untrained" in r]
    return found[-1] if found else None


def start_name(results: Sequence[Result]) -> str:
    """What all methods start from: an untrained model, or one whose head has seen the labels."""
    return PROBE if results[-1].get("head") == "probe" else "untrained"


def spread(runs: Sequence[Result], name: str) -> float:
    """How far chance moves a method's mean test score.

    The sample deviation over seeds, or the standard error of an accuracy on so many test examples:
    the larger. 0 where neither is known.
    """
    values = [r["test"][name] for r in runs]
    found = statistics.stdev(values) if len(values) > 1 else 0.0
    count = runs[0].get("test_examples")
    if name == "accuracy" and count:
        found = max(found, standard_error(statistics.fmean(values), count))
    return found


def standard_error(accuracy: float, count: int) -> float:
    """Of the accuracy on `count` examples."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


def verdict(results: Sequence[Result]) -> str:
    """One line: the best method on the test examples, or those that tie, beside their start.

    Two methods tie where their means are printed as the same number, or differ by no more than the
    larger :func:`spread`.
    """
    runs_of = {method: runs for (_, method), runs in cells(results).items()}
    scored, untrained = results[0]["scored"], untrained_scores(results)
    name, sign = ("accuracy", 1) if scored else ("loss", -1)

    def told(value: float) -> str:
        return f"{100 * value:.1f} %" if scored else f"{value:.3f}"

    means = {m: statistics.fmean(r["test"][name] for r in runs) for m, runs in runs_of.items()}
    order = sorted(means, key=lambda m: (math.isnan(means[m]), -sign * means[m]))
    best, highest = order[0], means[order[0]]
    tied = [
        f"{method} {told(means[method])}"
        for method in order
        if told(means[method]) == told(highest)
        or abs(means[method] - highest)
        <= max(spread(runs_of[method], name), spread(runs_of[best], name))
    ]
    line = f"Best on the test examples: {best}, {name} {told(highest)}"
    if len(tied) > 1:
        line = f"Tied on the test examples, within the spread: {name} of {', of '.join(tied)}"
    if untrained is not None:
        begin = start_name(results)
        line += f"; {begin}: {told(untrained[name])}"
        if not sign * highest > sign * untrained[name]:
            model = f"{begin} model" if begin != PROBE else begin
            line = f"no method has a better {name} on the test examples than the {model}, "
            line += told(untrained[name])
            losses = {m: _test_loss(runs) for m, runs in runs_of.items()}
            lowest = min(losses, key=lambda m: (math.isnan(losses[m]), losses[m]))
            if losses[lowest] < untrained["loss"]:
                line = f"N{line[1:]}; but the test loss fell from {untrained['loss']:.3f} to "
                line += f"{losses[lowest]:.3f} with {lowest}"
            else:
                line = f"Nothing learned: {line}"
    count = results[0].get("test_examples")
    if scored and count:
        error = 100 * standard_error(highest, count)
        line += f" (standard error {error:.1f} points, of {count} examples)"
    return line + "."


def _test_loss(runs: Sequence[Result]) -> float:
    return statistics.fmean(r["test"]["loss"] for r in runs)
