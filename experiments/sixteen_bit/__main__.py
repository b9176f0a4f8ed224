"""What 16-bit weights do to zeroth-order training, measured in three ways.

    python -m experiments.sixteen_bit drift --out runs/16-bit
    python -m experiments.sixteen_bit survival --out runs/16-bit
    python -m experiments.sixteen_bit finetune --out runs/16-bit

drift     How far weights wander under a loss that is constant, where no step should move them:
          MeZO's recipe (+mu, -2 mu, +mu), ours in place, and streamed.
survival  How much of one small update is left after the weights are rounded, stochastically or to
          nearest.
finetune  The same zeroth-order fine-tuning in fp32 and in 16 bits: same batches, and for our own
          recipes same directions; the loss is computed in fp32 from the model's logits. By default
          MiniLM on the demo sentences; `--text --model FOLDER` trains a causal language model
          on the sentences instead.

Each writes NAME.json and NAME.png into `--out`, and one `table.md` of all that is there.

Needs: pip install "zofo-optim[examples]"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..finetune import versions
from ..models import ModelError
from ..options import number
from ..tasks import DataError
from .report import PLOTS, finetune_line, write_table
from .rounding import drift, survival
from .runs import DEFAULT_RECIPES, RECIPES, load_problem, run

SIZES = [float(f"{m}e{e}") for e in range(-7, -3) for m in (1, 2, 5)] + [1e-3]


def bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def measure_finetuning(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Every recipe at every rate with every seed: results by rate, recipe and seed."""
    console = progress.console
    problem = load_problem(args)
    result: dict[str, Any] = {"problem": problem.name, "rates": {}}
    for lr in args.lr:
        for seed in args.seeds:
            for name in args.recipes:
                bar = progress.add_task(f"{name}, rate {lr:g}, seed {seed}", total=args.steps)
                one = run(
                    problem, RECIPES[name], lr, seed, args, lambda bar=bar: progress.advance(bar)
                )
                progress.remove_task(bar)
                rate = result["rates"].setdefault(f"{lr:g}", {})
                rate.setdefault(name, {})[str(seed)] = one
                console.print(finetune_line(name, lr, seed, one), highlight=False, soft_wrap=True)
    return result


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="What 16-bit weights do to zeroth-order training.")
    commands = p.add_subparsers(dest="command", required=True)
    count, positive = number(int, 1), number(float, 0, above=True)

    def command(name: str, text: str) -> Any:
        sub = commands.add_parser(name, help=text)

        def add(flag: str, text: str, **options: Any) -> None:
            shown = " (default: %(default)s)" if options.get("default") else ""
            sub.add_argument(flag, help=text + shown, **options)

        add("--out", "folder for everything written", type=Path, default=Path("runs/16-bit"))
        add("--name", "of the files", default=name)
        add("--mu", "perturbation step size", type=positive, default=1e-3)
        return add

    drifts = command("drift", "how far weights wander under a constant loss")
    survivals = command("survival", "how much of a small update is left")
    for add, elements in ((drifts, 2**16), (survivals, 2**20)):
        add("--count", "weights", type=count, default=elements)
        add("--sigma", "standard deviation of the weights", type=positive, default=0.02)
        add("--seed", "of weights and directions", type=number(int, 0), default=0)
    drifts("--steps", "steps", type=count, default=20_000)
    survivals("--sizes", "RMS sizes of the update", type=positive, nargs="+", default=SIZES)
    survivals("--repeats", "directions averaged over", type=count, default=5)

    add = command("finetune", "the same fine-tuning in fp32 and in 16 bits")
    add("--model", "hub id or folder; default: the packaged MiniLM")
    add("--text", "language modelling on the task's sentences", action="store_true")
    add("--task", "whose sentences", choices=("sentiment", "sst2"), default="sentiment")
    add("--data", "folder with train.tsv and dev.tsv, or hub; default: as finetune.py")
    add("--recipes", "what to compare", nargs="+", choices=RECIPES, default=DEFAULT_RECIPES)
    add("--lr", "learning rates", type=positive, nargs="+", default=[1e-4])
    add("--schedule", "of the rates", choices=("constant", "linear"), default="constant")
    add("--steps", "steps of each run", type=count, default=100)
    add("--batch-size", "examples a step", type=count, default=16)
    add("--train-size", "use the first so many training examples", type=count, default=1000)
    add("--dev-size", "use the first so many dev examples", type=count, default=256)
    add("--min-words", "--text: leave shorter sentences out", type=count, default=6)
    add("--eval-every", "steps between evaluations", type=count, default=25)
    add("--seeds", "of data order and directions", type=number(int, 0), nargs="+", default=[0])
    add("--include", "train these parameters, by pattern; none: all", nargs="*", default=[])
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    console = Console()
    with bars(console) as progress:

        def track(steps: Any, text: str) -> Any:
            if not console.is_terminal:
                console.print(text, highlight=False)
            return progress.track(steps, description=text)

        shared = {k: v for k, v in vars(args).items() if k in ("count", "sigma", "seed")}
        try:
            if args.command == "drift":
                result = drift(**shared, mu=args.mu, steps=args.steps, progress=track)
            elif args.command == "survival":
                result = survival(**shared, sizes=args.sizes, repeats=args.repeats, progress=track)
            else:
                result = measure_finetuning(args, progress)
        except (DataError, ModelError) as error:
            p.error(str(error))
    settings = {**vars(args), "threads": torch.get_num_threads()}
    for key in ("out", "data", "model"):  # where things lay is nobody's business
        if settings.get(key) is not None:
            settings[key] = Path(str(settings[key])).name
    content = {
        "command": args.command,
        "result": result,
        "settings": settings,
        "versions": versions(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, default=str) + "\n"
    (args.out / f"{args.name}.json").write_text(text, encoding="utf-8")
    PLOTS[args.command](args.out / f"{args.name}.png", content)
    console.print(write_table(args.out), highlight=False, soft_wrap=True, markup=False)
    console.print(f"Results, plots and table: {args.out}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
