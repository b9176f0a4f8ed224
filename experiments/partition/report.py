"""Tables and plots of the grid: what each recipe reaches and takes, and where hybrids are best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zofo_optim.whole import strict, write_json

from ..report import Result, markdown, mean
from ..search import is_at_an_end
from . import plots
from .comparisons import Found, additions, is_ablation, points, where
from .grid import LONGER, MIDDLE, Cell
from .recipes import HEAD, TOP, step_name
from .regions import Point

ABOUT = """# Where hybrid training pays

- *A + B*: A trains by first order, all the rest by zeroth order, B; without B the rest is frozen.
  First order is AdamW, where SGD is not named.
- *0.3 of flops*: the tensors that are worth most within that share of full back-propagation, as
  Hi-ZFO picks them. With *ZO Gaussian, coupling 0.1* this is Hi-ZFO; *ZO Gaussian* alone is MeZO.
- *ZO per example*: a direction of rank 1 for each example. *ZO biases*: Gaussian, of the biases of
  the attention only; all else is frozen.
- *in backward*: gradients are applied and freed as they come (LOMO). *checkpointed*: layers are
  evaluated again in the backward. Neither changes a result, so these share the runs of the step
  without.

Means over seeds, ± sample deviation. A rate is searched on the first seed by the development loss,
on one grid, half a decade apart, from a start up or down until the best one lies between others, in
at most 5 runs: * where it does not; ' where it is that of another recipe: partitions take that of
0.3 of flops, LoRA in few layers that of LoRA. The first seed favours all a little. The weights of
the best evaluation are tested. Milliseconds are of the process, on one thread, on the first batches
of a run; memory is the most that live tensors take in a step on the longest rows, weights included.

A hybrid is *best* where its mean is lower than that of all else that takes no more, by more than
the larger spread of both: the deviation over seeds, or the standard error of an error on so many
test examples. Ablations do not take part.
"""


def _rates(found: Found, cell: Cell) -> list[str]:
    texts = []
    for which in ("fo", "zo"):
        rate = found.results[cell][0]["settings"][f"lr_{which}"]
        if rate is None:
            texts.append("")
        elif cell.searched == which:
            texts.append(f"{rate:g}" + "*" * is_at_an_end(found.searched[cell]))
        else:
            texts.append(f"{rate:g}'")
    return texts


def _count(parameters: int) -> str:
    if parameters < 1e5:
        return f"{parameters / 1e3:.1f} k" if parameters else ""
    return f"{parameters / 1e6:.2f} M"


def table(found: Found, some: Sequence[Cell]) -> str:
    """A line a cell: what it reaches and takes; "" where there is none."""
    if not some:
        return ""
    scored = found.results[some[0]][0]["scored"]
    rows = [
        [
            *("recipe", "FO rate", "ZO rate", "FO parameters", "dev. loss", "test loss"),
            *(["test accuracy, %"] if scored else []),
            *("steps", "ms a step", "peak MB"),
        ]
    ]
    for cell in some:
        runs = found.results[cell]
        line = [cell.name, *_rates(found, cell), _count(runs[0]["parameters_fo"])]
        line += [mean([run["best"]["loss"] for run in runs], 3)]
        line += [mean([run["test"]["loss"] for run in runs], 3)]
        if scored:
            line += [mean([run["test"]["accuracy"] for run in runs], 1, 100)]
        cost = found.costs.get(step_name(cell.recipe))
        line += [str(runs[0]["settings"]["steps"])]
        line += ["", ""] if cost is None else [_ms(cost["seconds"]), _mb(cost["peak_bytes"])]
        rows.append(line)
    return markdown(rows)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f}"


def rates(found: Found) -> str:
    """Development losses of each searched run."""
    lines = ["### Searched: development loss by rate\n\n"]
    for cell, runs in found.searched.items():
        if runs:
            tried = ", ".join(f"{rate:g}: {run['best']['loss']:.3f}" for rate, run in runs.items())
            order = {"fo": "first", "zo": "zeroth"}[cell.searched or ""]
            lines.append(f"- {cell.name}, of {order} order: {tried}\n")
    return "".join(lines)


def costs(found: Found) -> str:
    """All measured steps, by memory."""
    order = sorted(found.costs.items(), key=lambda item: item[1]["peak_bytes"])
    rows = [["step", "ms", "peak MB"]]
    rows += [[name, _ms(cost["seconds"]), _mb(cost["peak_bytes"])] for name, cost in order]
    return "### Steps, by memory\n\n" + markdown(rows) if order else ""


def section(out: Path, found: Found) -> str:
    """Of a model; its plots are written."""
    equal, seconds = found.plain(), found.plain(equal_seconds=True)
    one = next(iter(found.results.values()))[0]
    parts = [f"## {found.name}, {found.study.task}\n"]
    parts.append(
        f"{one['settings']['batch']} examples a step; development loss at the start "
        f"{one['curve'][0]['loss']:.3f}; {one['test_examples']} test examples.\n"
    )
    small = [cell for cell in equal if _is_small(cell)]
    own = [cell for cell in equal if cell not in small]
    groups = [("Hi-ZFO's comparison, at equal steps", own)]
    groups.append(("Small first-order parts, at equal steps", small))
    ablations = [cell for cell in found.results if is_ablation(cell)]
    if ablations:
        base = [cell for cell in own if cell.coupled and cell.recipe.budget == MIDDLE]
        groups.append(("Coupling, and the ratio of rates", [*base, *ablations]))
    longer = found.plain(times=LONGER)
    groups.append((f"No error propagated far, at {LONGER} times the steps", longer))
    if len(seconds) > 1:
        groups.append(("At equal seconds: those of full fine-tuning", seconds))
    for heading, some in groups:
        if some:
            parts += [f"### {heading}\n", table(found, some)]
    for metric in found.metrics():
        if added := additions(found, metric):
            parts += [f"### What zeroth order adds, {metric}\n", added]
    parts += [*_where(found, equal, seconds, longer), costs(found), rates(found)]
    return "\n".join([*parts, *_plotted(out, found, equal, seconds)])


def _is_small(cell: Cell) -> bool:
    recipe = cell.recipe
    return recipe.first in (HEAD, TOP) or recipe.layers > 0 or recipe.of == "memory"


def _where(
    found: Found, equal: Sequence[Cell], seconds: Sequence[Cell], longer: Sequence[Cell]
) -> list[str]:
    parts = []
    for metric in found.metrics():
        for some, spent, what in (
            (equal, "memory", "Over memory, at equal steps"),
            (seconds, "memory", "Over memory, at equal seconds"),
            (longer, "memory", f"Over memory, at {LONGER} times the steps"),
            (equal, "seconds", "Over seconds, at equal steps"),
        ):
            if said := where(points(found, some, metric, spent), metric, spent):
                parts.append(f"{what}. {said}")
    return ["### Where hybrids are best\n", *parts] if parts else []


def _plotted(out: Path, found: Found, equal: Sequence[Cell], seconds: Sequence[Cell]) -> list[str]:
    """Links to plots, which are written."""
    metric, name = found.metrics()[-1], f"{found.name}-{found.study.task}"
    title = f"{found.name}, {found.study.task}"
    panels: dict[str, list[Point]] = {}
    for label, some, spent, scale in (
        ("peak MB, at equal steps", equal, "memory", 1e6),
        ("peak MB, at equal seconds", seconds, "memory", 1e6),
        ("seconds, at equal steps", equal, "seconds", 1.0),
    ):
        made = points(found, some, metric, spent) if len(some) > 1 else []
        if made:
            panels[label] = [
                Point(p.name, p.hybrid, p.spent / scale, p.losses, p.error) for p in made
            ]
    texts = [f"![curves]({name}-curves.png)\n"]
    plots.curves(
        out / f"{name}-curves.png", {cell.name: found.results[cell] for cell in equal}, title
    )
    if panels:
        plots.pareto(out / f"{name}.png", panels, metric, title)
        texts.insert(0, f"![{metric}]({name}.png)\n")
    return texts


def render(out: Path, models: Sequence[Found]) -> None:
    """Write ``table.md``, ``runs.json`` and plots."""
    sections = [section(out, found) for found in models]
    (out / "table.md").write_text("\n".join([ABOUT, *sections]), encoding="utf-8")
    write_json(out / "runs.json", strict([_kept(found) for found in models]))


def _kept(found: Found) -> dict[str, Any]:
    """All runs, those of the searches too."""
    runs: dict[str, Result] = {}
    for cell, results in found.results.items():
        for run in [*found.searched[cell].values(), *results]:
            settings = run["settings"]
            rates = [settings[name] for name in ("lr_fo", "lr_zo")]
            runs[f"{cell.name}, {rates}, {settings['seed']}"] = run
    return {"model": found.name, "steps": found.costs, "runs": list(runs.values())}
