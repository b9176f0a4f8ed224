"""Tables of results: means over seeds, the paper's Table 1, cost and steps to a given loss.

A result is what `training.run` returns, of one task, method and seed.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Result = dict[str, Any]
Cells = dict[tuple[str, str], list[Result]]


def cells(results: Iterable[Result]) -> Cells:
    """Results by task and method, one a seed, in the order in which they come."""
    found: Cells = {}
    for result in results:
        found.setdefault((result["task"], result["method"]), []).append(result)
    return found


def tasks_of(grid: Cells) -> list[str]:
    return list(dict.fromkeys(task for task, _ in grid))


def methods_of(grid: Cells) -> list[str]:
    return list(dict.fromkeys(method for _, method in grid))


def mean(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """The mean, and the sample standard deviation where there are several."""
    scaled = [scale * value for value in values]
    text = f"{statistics.fmean(scaled):.{digits}f}"
    return text if len(scaled) == 1 else f"{text} ± {statistics.stdev(scaled):.{digits}f}"


def quantity(results: Sequence[Result], name: str) -> str:
    """Test accuracy and F1 in percent, test loss, the training loss after the best step."""
    if name == "train_loss":
        return mean([r["best"]["train_loss"] for r in results], 3)
    values = [r["test"][name] for r in results]
    return mean(values, 3) if name == "loss" else mean(values, 1, 100.0)


def start(grid: Cells, task: str, name: str) -> str:
    """Of the untrained model, on the development data: where all methods start."""
    for (own, _), results in grid.items():
        if own == task:
            value = results[0]["curve"][0][name]
            return f"{value:.3f}" if "loss" in name else f"{100 * value:.1f}"
    raise KeyError(task)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def as_csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def table1(grid: Cells, name: str) -> list[list[str]]:
    """The paper's Table 1: a row a task, a column a method; the best of a row in bold."""
    methods = methods_of(grid)
    rows = [["task", *methods]]
    for task in tasks_of(grid):
        own = {m: grid[task, m] for m in methods if (task, m) in grid}
        if "loss" not in name and not next(iter(own.values()))[0]["scored"]:
            continue
        shown = {m: quantity(results, name) for m, results in own.items()}
        leading = {m: float(text.split()[0]) for m, text in shown.items()}
        best = (min if "loss" in name else max)(leading.values())
        bold = {m: f"**{text}**" if leading[m] == best else text for m, text in shown.items()}
        rows.append([task, *(bold.get(m, "") for m in methods)])
    return rows


def reached(result: Result, loss: float) -> tuple[float, float] | None:
    """Steps and seconds until the development loss was at most `loss`; None: never."""
    for point in result["curve"]:
        if point["loss"] <= loss:
            return point["step"], point["seconds"]
    return None


def best_loss(results: Sequence[Result]) -> float:
    """The development loss that every seed reached."""
    return max(float(r["best"]["loss"]) for r in results)


def cost_table(grid: Cells, task: str) -> list[list[str]]:
    """Losses, times, memory; and steps and seconds to a given development loss.

    The loss given is that of the first-order method with the same adapter (its best, in its worst
    seed), and for `zo` its own; and one for all: what the method that gets least far reaches. Where
    that is no lower than the untrained model's, it takes 0 steps.
    """
    own = {method: results for (t, method), results in grid.items() if t == task}
    common = max(best_loss(results) for results in own.values())
    head = ["method", "development loss", "s/step", "peak MB", f"to {common:.3f}: steps", "seconds"]
    rows = [[*head, "to the FO method's: loss", "steps", "seconds"]]
    for method, results in own.items():
        kind, _, adapter = method.partition("-")
        partner = own.get(f"fo-{adapter}", results) if kind == "hybrid" else results
        target = best_loss(partner)
        rows.append(
            [
                method,
                mean([r["best"]["loss"] for r in results], 3),
                mean([statistics.fmean([r["seconds_per_step"] for r in results])], 3),
                f"{max(r['peak_memory_bytes'] for r in results) / 1e6:,.0f}",
                *_until(results, common),
                f"{target:.3f}",
                *_until(results, target),
            ]
        )
    return rows


def _until(results: Sequence[Result], loss: float) -> tuple[str, str]:
    found = [reached(result, loss) for result in results]
    there = [pair for pair in found if pair is not None]
    if len(there) < len(found):
        return (f"{len(there)} of {len(found)} seeds reach it", "-") if there else ("never", "-")
    steps, seconds = zip(*there, strict=True)
    return f"{statistics.fmean(steps):.0f}", f"{statistics.fmean(seconds):.1f}"


def long_table(results: Iterable[Result]) -> list[list[Any]]:
    """One row a run, for CSV."""
    head = ["task", "method", "seed", "test_accuracy", "test_f1", "test_loss", "dev_loss"]
    head += ["train_loss", "best_step", "steps", "seconds", "seconds_per_step"]
    head += ["peak_memory_bytes", "parameters_zo", "parameters_fo", "skipped_steps"]
    rows: list[list[Any]] = [head]
    for r in results:
        best, test = r["best"], r["test"]
        scored = (test["accuracy"], test["f1"]) if r["scored"] else ("", "")
        run = (r[name] for name in rows[0][9:])
        losses = (test["loss"], best["loss"], best["train_loss"], best["step"])
        rows.append([r["task"], r["method"], r["seed"], *scored, *losses, *run])
    return rows


def mean_table(grid: Cells) -> list[list[Any]]:
    """Table 1 for CSV, one row a task and method: means and sample deviations of test scores."""
    names = ["accuracy", "f1", "loss"]
    head = ["task", "method", "seeds", *(f"{n}{end}" for n in names for end in ("", "_std"))]
    rows: list[list[Any]] = [head]
    for (task, method), results in grid.items():
        row: list[Any] = [task, method, len(results)]
        for name in names:
            values = [r["test"][name] for r in results]
            told = name == "loss" or results[0]["scored"]
            deviation = statistics.stdev(values) if len(values) > 1 else ""
            row += [statistics.fmean(values), deviation] if told else ["", ""]
        rows.append(row)
    return rows


def curve_table(results: Iterable[Result]) -> list[list[Any]]:
    """One row an evaluation, for CSV."""
    names = ["step", "seconds", "loss", "train_loss", "accuracy", "f1"]
    rows: list[list[Any]] = [["task", "method", "seed", *names]]
    for r in results:
        for point in r["curve"]:
            rows.append([r["task"], r["method"], r["seed"], *(point[name] for name in names)])
    return rows
