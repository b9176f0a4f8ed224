"""Tables and plots of the runs: what each method reaches, in how many seconds and texts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..plots import band, finish
from ..report import Result, as_csv, markdown, mean
from .grid import FULL_SIZE, GRPO, POLICY_GRADIENT, POPULATION, Cell
from .runs import merit, reached

TARGETS: Mapping[str, Sequence[float]] = {
    "style": (0.2, 0.5, 0.9),
    "format": (0.2,),
    "graded-format": (0.55, 0.65),
    "sentiment": (0.5, 0.8),
}
"""Rewards that are waited for."""
COLOURS = {
    POPULATION: ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#000000", "#999999"),
    FULL_SIZE: ("#D55E00", "#E69F00", "#8C510A"),
    POLICY_GRADIENT: ("#555555",),
    GRPO: ("#AAAAAA",),
}
SHOWN_TEXTS = 3
ABOUT = """# Scores of generated text

Means over seeds, ± sample deviation, at the rate whose run on the first seed was worth most in the
mean of its curve, so that seed favours all a little; * where the rate is the lowest or highest that
was tried. Rewards are means over fresh texts of the weights at rest. Seconds are those of the
process on one thread, scores included, evaluations and the first step's checks not; to a reward,
between evaluations by interpolation: - where a seed does not get there. KL is the divergence from
the start in nats a text. Memory is the most that live tensors take in a step, over that of
generating as many texts with nothing else; of full-size directions, of one side.
"""


@dataclass
class Found:
    """The runs of a cell: by rate on the first seed, and one a seed at the best rate."""

    cell: Cell
    searched: Mapping[float, Result]
    results: Sequence[Result]

    @property
    def rate(self) -> float:
        return float(self.results[0]["settings"]["rate"])

    def end(self, name: str) -> list[float]:
        """By seed."""
        return [run["curve"][-1][name] for run in self.results]

    def to(self, reward: float, what: str = "seconds") -> list[float] | None:
        """Seconds, samples or steps to a reward, by seed; None: a seed does not get there."""
        found = [reached(run, reward, what) for run in self.results]
        there = [value for value in found if value is not None]
        return there if len(there) == len(found) else None

    def seconds_a_step(self) -> float:
        return statistics.fmean(run["seconds_per_step"] for run in self.results)


def by_problem(found: Sequence[Found]) -> dict[str, list[Found]]:
    problems: dict[str, list[Found]] = {}
    for one in found:
        problems.setdefault(one.cell.problem, []).append(one)
    return problems


def table(found: Sequence[Found], memory: Mapping[str, Mapping[str, int]]) -> str:
    """A line a cell."""
    targets = TARGETS[found[0].cell.reward]
    penalised = found[0].cell.beta > 0
    head = ["method", "rate", "reward at the end", *["less penalty"] * penalised, "KL"]
    head += ["texts a step", "s a step", "checks, s"]
    head += [f"seconds to {target:g}" for target in targets]
    head += [f"texts to {targets[-1]:g}", "memory, times generation"]
    rows = [head]
    for one in found:
        mark = "*" if one.rate in (min(one.searched), max(one.searched)) else ""
        mark *= len(one.searched) > 1
        line = [one.cell.name, f"{one.rate:g}{mark}", mean(one.end("reward"), 3)]
        line += [mean(one.end("worth"), 3)] * penalised
        line += [mean(one.end("kl"), 1), str(one.cell.texts), f"{one.seconds_a_step():.2f}"]
        line += [f"{statistics.fmean(run['verify_seconds'] for run in one.results):.1f}"]
        line += [_waited(one.to(target), 1) for target in targets]
        line += [_waited(one.to(targets[-1], "samples"), 0)]
        sizes = memory.get(one.cell.kind)
        line += [f"{sizes['step'] / sizes['plain']:.2f}" if sizes else ""]
        rows.append(line)
    return markdown(rows)


def _waited(values: list[float] | None, digits: int) -> str:
    return "-" if values is None else mean(values, digits)


def ratios(found: Sequence[Found]) -> str:
    """How many times the seconds of the population of 64 each method takes to each reward."""
    base = next((one for one in found if one.cell.name == f"{POPULATION}, 64"), None)
    if base is None:
        return ""
    targets = TARGETS[base.cell.reward]
    rows = [["seconds, over those of the population of 64", *(f"to {t:g}" for t in targets)]]
    for one in found:
        if one is not base:
            line = [_ratio(one.to(target), base.to(target)) for target in targets]
            rows.append([one.cell.name, *line])
    return markdown(rows)


def _ratio(one: list[float] | None, base: list[float] | None) -> str:
    if one is None or base is None:
        return "-"
    return f"{statistics.fmean(one) / statistics.fmean(base):.2f}"


def rates(found: Sequence[Found]) -> str:
    """Means of the curves of each searched run."""
    lines = []
    for one in found:
        tried = ", ".join(f"{rate:g}: {merit(run):.3f}" for rate, run in one.searched.items())
        lines.append(f"- {one.cell.name}: {tried}\n")
    return "".join(lines)


def texts(found: Sequence[Found]) -> str:
    """Some of the first seed, at the start and at the end."""
    shown = [f"- start: {_quoted(found[0].results[0]['texts']['start'])}\n"]
    for one in found:
        shown.append(f"- {one.cell.name}: {_quoted(one.results[0]['texts']['end'])}\n")
    return "".join(shown)


def _quoted(some: Sequence[str]) -> str:
    return " / ".join(f"“{' '.join(text.split())}”" for text in some[:SHOWN_TEXTS])


def plot(path: Path, found: Sequence[Found], title: str) -> None:
    """Reward against seconds and against texts; bands are the range over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained", sharey=True)
    count: dict[str, int] = {}
    for one in found:
        number = count[one.cell.method] = count.get(one.cell.method, -1) + 1
        colours = COLOURS[one.cell.method]
        for axis, x in zip(axes, ("seconds", "samples"), strict=True):
            colour = colours[number % len(colours)]
            band(axis, one.results, "reward", one.cell.name, x, color=colour)
    for axis, label in zip(axes, ("seconds of one core", "texts generated"), strict=True):
        axis.set(xlabel=label)
        axis.set_xscale("log", nonpositive="mask")  # the start is at 0
    axes[0].set(ylabel="reward of fresh texts")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    finish(figure, title, path)


def render(out: Path, found: Sequence[Found], memory: Mapping[str, Mapping[str, int]]) -> None:
    """Write ``table.md``, ``runs.csv``, ``curves.csv`` and a plot for each reward."""
    parts = [ABOUT]
    for problem, own in by_problem(found).items():
        parts += [f"## {problem}\n", table(own, memory), ratios(own)]
        parts += [f"Searched:\n\n{rates(own)}", f"Texts of the first seed:\n\n{texts(own)}"]
        plot(out / f"{problem}.png", own, problem)
        parts.append(f"![rewards]({problem}.png)\n")
    runs = [run for one in found for run in _all(one)]
    if runs:
        last = runs[0]
        parts.append(f"Made with {_listed(last['versions'])} on {_listed(last['machine'])}.\n")
    (out / "table.md").write_text("\n".join(part for part in parts if part), encoding="utf-8")
    (out / "runs.csv").write_text(as_csv(run_rows(found)), encoding="utf-8")
    (out / "curves.csv").write_text(as_csv(curve_rows(found)), encoding="utf-8")


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _all(one: Found) -> list[Result]:
    """Each once."""
    runs = [*one.searched.values(), *one.results]
    return list({(run["settings"]["rate"], run["settings"]["seed"]): run for run in runs}.values())


def _labels(one: Found, run: Result) -> list[Any]:
    return [one.cell.problem, one.cell.name, run["settings"]["rate"], run["settings"]["seed"]]


LABELS = ["problem", "method", "rate", "seed"]


def run_rows(found: Sequence[Found]) -> list[list[Any]]:
    """For CSV, one row a run."""
    point = ["step", "samples", "reward", "kl", "worth", "seconds"]
    times = ["wall_seconds", "seconds_per_step", "verify_seconds"]
    names = [*(f"last_{name}" for name in point[2:5]), "steps", "samples", "seconds"]
    rows: list[list[Any]] = [[*LABELS, *names, *times]]
    for one in found:
        for run in _all(one):
            end = run["curve"][-1]
            values = [end[name] for name in ("reward", "kl", "worth", "step", "samples", "seconds")]
            rows.append([*_labels(one, run), *values, *(run[name] for name in times)])
    return rows


def curve_rows(found: Sequence[Found]) -> list[list[Any]]:
    """For CSV, one row an evaluation."""
    names = ["step", "samples", "seconds", "reward", "kl", "worth"]
    rows: list[list[Any]] = [[*LABELS, *names]]
    for one in found:
        for run in _all(one):
            for point in run["curve"]:
                rows.append([*_labels(one, run), *(point[name] for name in names)])
    return rows
