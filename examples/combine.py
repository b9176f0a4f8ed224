"""Combine results of several runs of `finetune.py` into one table and plot.

    python examples/combine.py runs/a runs/b --out examples/results/sst2 --title "..."

Runs must share the data, the steps, the batches and the starting accuracy; a later run's method of
the same name needs a label: `runs/b:hybrid-lora=hybrid, all weights`. Writes `results.json`,
`curves.png` and `table.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report import Result, plot_curves, write_results

SHARED = ("data", "steps", "batch_size", "train_examples", "dev_examples", "seeds", "head")


class MismatchError(ValueError):
    """Runs that cannot stand side by side; the message says which setting differs."""


def load(argument: str) -> tuple[dict[str, Result], dict[str, Any]]:
    """Methods of one run, chosen and renamed by `folder[:method=label;...]`, and the whole file."""
    folder, _, selection = argument.partition(":")
    run = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    labels = dict(part.split("=", 1) for part in selection.split(";")) if selection else {}
    unknown = set(labels) - set(run["methods"])
    if unknown:
        raise MismatchError(
            f"{folder} has no method {sorted(unknown)}, only {list(run['methods'])}"
        )
    chosen = labels or {name: name for name in run["methods"]}
    return {label: run["methods"][name] for name, label in chosen.items()}, run


def combine(arguments: Sequence[str]) -> tuple[dict[str, Result], list[dict[str, Any]]]:
    """All methods under their labels, and the files they came from."""
    methods: dict[str, Result] = {}
    files: list[dict[str, Any]] = []
    for argument in arguments:
        chosen, run = load(argument)
        for key in SHARED if files else ():
            first, this = files[0]["settings"].get(key), run["settings"].get(key)
            if first != this:
                raise MismatchError(f"{argument}: {key} must be {first!r} as before, got {this!r}")
        twice = set(methods) & set(chosen)
        if twice:
            raise MismatchError(f"{argument}: methods must differ, got {sorted(twice)} twice")
        methods.update(chosen)
        files.append(run)
    return methods, files


def percent(mean: float, deviation: float | None = None) -> str:
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def markdown(methods: Mapping[str, Result], baselines: Mapping[str, float]) -> str:
    """The table, accuracies in percent on the dev set: mean ± sample deviation over the seeds."""
    lines = [
        "| method | accuracy, best | accuracy, last | training loss | s/step | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    names = {"prompts": "zero-shot prompts (the start)", "probe": "linear probe, frozen model"}
    for name in sorted(baselines, key=list(names).index):
        lines.append(f"| {names[name]} | {percent(baselines[name])} | | | | |")
    for name, result in methods.items():
        after = percent(result["accuracy_after"], result.get("accuracy_after_std"))
        lines.append(
            f"| {name} | {after} | {percent(result['accuracy_last'])} "
            f"| {result['loss_first']:.3f} → {result['loss_last']:.3f} "
            f"| {result['seconds_per_step']:.2f} | {result['peak_memory_bytes'] / 1e6:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Combine runs of finetune.py.")
    p.add_argument("runs", nargs="+", metavar="FOLDER[:METHOD=LABEL;...]")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--title", default="")
    args = p.parse_args(argv)
    try:
        methods, files = combine(args.runs)
    except (MismatchError, OSError) as error:
        p.error(str(error))
    for run in files:  # where a run lay is nobody's business
        for key in ("out", "data", "model"):
            run["settings"][key] = Path(str(run["settings"].get(key, ""))).name
    for result in methods.values():
        for one in (result, *result.get("seeds", {}).values()):
            one.pop("saved", None)
    args.out.mkdir(parents=True, exist_ok=True)
    write_results(
        args.out / "results.json",
        methods,
        baselines=files[0]["baselines"],
        settings=[run["settings"] for run in files],
        versions=files[0]["versions"],
    )
    plot_curves(args.out / "curves.png", methods, args.title)
    table = markdown(methods, files[0]["baselines"])
    (args.out / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
