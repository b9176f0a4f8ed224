"""Run a grid of methods, tasks and seeds, and render the paper's Table 1 and Figures 2 and 3.

    python -m experiments.compare --tasks sst2 copa winogrande wic --seeds 0 1 2 --out runs/compare
    python -m experiments.compare --model facebook/opt-1.3b --data hub --tasks sst2 --dtype bfloat16

Runs are those of `finetune.py`, with its options and its folders: one that is interrupted goes on,
one that is finished is not run again. So a grid may be spread over processes that write to the same
`--out`, each with some of the methods, tasks or seeds: all runs there are rendered.

`OUT` receives

    table1.md                test accuracy, F1 and loss by task and method, mean ± deviation; the
                             cost of a step; steps and seconds to a given development loss
    table1.csv               the test scores: means and sample deviations
    runs.csv                 one line a run
    curves.csv               every evaluation of every run
    figure3-TASK.png         losses and accuracy against steps, loss against seconds
    figure2-TASK.png, .csv   with `--rates ADAPTER`: training loss where base and adapter have the
                             small rate, the large rate, or each its own (the presets', or
                             --lr-zo and --lr-fo)
    results.json             settings, versions, machine

Needs, in a checkout: pip install -e ".[experiments]"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from zofo_optim.whole import write_json

from . import report
from .commands import RESUMES, Ending
from .finetune import Runs, machine, model_name, there, versions
from .methods import ADAPTERS
from .options import OUT, Options, check_task, option, parse
from .own_data import OWN
from .plots import plot_curves, plot_rates
from .report import Result, as_csv, cells, markdown
from .summary import start_name
from .tasks import TASKS

QUANTITIES = {
    "accuracy": "Test accuracy, %",
    "f1": "Test F1 (macro), %",
    "loss": "Test loss",
    "train_loss": "Training loss at the best development loss",
}


def rates(runs: Runs, task: str, adapter: str) -> list[tuple[str, dict[str, list[Result]]]]:
    """The runs of Figure 2: headings, and the results by method."""
    options = runs.options
    own = runs.settings(task, f"hybrid-{adapter}", 0)
    assert own.lr_zo is not None
    assert own.lr_fo is not None
    small, large = sorted((own.lr_zo, own.lr_fo))
    base = {"include": own.include, "samples": own.samples, "steps": own.steps}
    panels = []
    for heading, lr_zo, lr_fo, methods in (
        (f"small rate, {small:g}", small, small, ("zo", f"fo-{adapter}", own.method)),
        (f"large rate, {large:g}", large, large, ("zo", f"fo-{adapter}", own.method)),
        (f"base {own.lr_zo:g}, adapter {own.lr_fo:g}", own.lr_zo, own.lr_fo, (own.method,)),
    ):
        lines: dict[str, list[Result]] = {}
        for method in methods:
            pair = {"lr_zo": lr_zo} if method == "zo" else {"lr_fo": lr_fo}
            pair = {"lr_zo": lr_zo, "lr_fo": lr_fo} if method == own.method else pair
            for seed in dict.fromkeys(options.seeds):
                wanted = runs.settings(task, method, seed, **{**base, **pair})
                folder = options.out / task / "rates" / f"{method}-{lr_zo:g}-{lr_fo:g}"
                lines.setdefault(method, []).append(runs.run(wanted, folder / f"seed-{seed}"))
        panels.append((heading, lines))
    return panels


def rates_table(panels: Sequence[tuple[str, dict[str, list[Result]]]]) -> list[list[Any]]:
    """The evaluations in Figure 2, for CSV."""
    rows: list[list[Any]] = [["panel", *report.curve_table([])[0]]]
    for heading, lines in panels:
        for runs in lines.values():
            rows += [[heading, *row] for row in report.curve_table(runs)[1:]]
    return rows


def render(out: Path, results: Sequence[Result], name: str) -> str:
    """Write tables and Figure 3; returns the Markdown."""
    grid = cells(results)
    parts = [f"# {name}\n"]
    for quantity, heading in QUANTITIES.items():
        rows = report.table1(grid, quantity)
        if len(rows) > 1:
            parts.append(f"## {heading}\n\n{markdown(rows)}")
    for task in report.tasks_of(grid):
        own = [result for result in results if result["task"] == task]
        parts.append(
            f"## {task}: cost, and steps and seconds to a development loss\n\n"
            f"{start_name(own).capitalize()}: {report.start(grid, task, 'loss')}.\n\n"
            + markdown(report.cost_table(grid, task))
        )
        path = out / f"figure3-{task}.png"
        plot_curves(path, own, f"{name} on {task}", by_seconds=True)
        parts.append(f"![curves]({path.name})\n")
    text = "\n".join(parts)
    (out / "table1.md").write_text(text, encoding="utf-8")
    (out / "table1.csv").write_text(as_csv(report.mean_table(grid)), encoding="utf-8")
    (out / "runs.csv").write_text(as_csv(report.long_table(results)), encoding="utf-8")
    (out / "curves.csv").write_text(as_csv(report.curve_table(results)), encoding="utf-8")
    return text


def shared_settings(results: Sequence[Result]) -> dict[str, Any]:
    """Settings by method and task, without seeds and places."""
    found: dict[str, Any] = {}
    for result in results:
        chosen = {k: v for k, v in result["settings"].items() if k not in ("seed", "data")}
        chosen["model"] = model_name(chosen["model"])
        found[f"{result['task']} {result['method']}"] = chosen
    return found


@dataclass
class CompareOptions(Options):
    """The command line of `compare`."""

    tasks: list[str] = option(["sst2"], f"of {', '.join((*TASKS, OWN))}")
    rates: str | None = option(None, "also draw Figure 2, with this adapter", choices=ADAPTERS)
    out: Path = option(Path("runs/compare"), OUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        for task in self.tasks:
            check_task(task)


def main(argv: Sequence[str] | None = None) -> int:
    about = "Compare methods on tasks, as the paper's tables and figures."
    options, parser = parse(CompareOptions, "experiments.compare", about, argv)
    console = Console()
    out = options.out
    with Ending(parser, console, RESUMES) as ending:
        runs = Runs(options, console)
        for task in dict.fromkeys(options.tasks):
            runs.task(task)
        results = [result for task in (*TASKS, OWN) for result in there(out, task)]
        assert options.model is not None
        name = model_name(options.model)
        print(render(out, results, name))
        for task in options.tasks if options.rates else ():
            assert options.rates is not None
            panels = rates(runs, task, options.rates)
            title = f"{name} on {task}, {options.rates} tuning"
            plot_rates(out / f"figure2-{task}.png", panels, title)
            text = as_csv(rates_table(panels))
            (out / f"figure2-{task}.csv").write_text(text, encoding="utf-8")
    if ending.code:
        return ending.code
    write_json(
        out / "results.json",
        {
            "settings": shared_settings(results),
            "versions": versions(),
            "machine": machine(runs.device),
        },
    )
    console.print(f"Tables and figures: {out}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
