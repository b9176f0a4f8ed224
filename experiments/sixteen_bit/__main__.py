"""What 16-bit weights do to zeroth-order training, measured in five ways.

    python -m experiments.sixteen_bit drift --out runs/16-bit
    python -m experiments.sixteen_bit survival --out runs/16-bit
    python -m experiments.sixteen_bit bias --out runs/16-bit
    python -m experiments.sixteen_bit slopes --out runs/16-bit
    python -m experiments.sixteen_bit finetune --out runs/16-bit

drift     How far weights wander under a loss that is constant, where no step should move them:
          MeZO's recipe (+mu, -2 mu, +mu), ours in place, and streamed.
survival  How much of one small update is left after the weights are rounded, stochastically or to
          nearest.
bias      How much of a gradient is left in the mean estimate, where weights are spaced widely
          beside mu: with the noise version of today, and with the first one.
slopes    How slopes of one batch's loss differ from those in fp32 at the same weights, along the
          same directions: full or of rank 1, in place or streamed.
finetune  The same zeroth-order fine-tuning in fp32 and in 16 bits: same batches, and for our own
          recipes same directions; the loss is computed in fp32 from the model's logits. By default
          MiniLM on the demo sentences; `--text --model FOLDER` trains a causal language model
          on the sentences instead.

Each writes NAME.json and NAME.png into `--out`, and one `table.md` of all that is there.

Needs, in a checkout: pip install -e ".[experiments]"
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import DataError
from ..finetune import versions
from ..models import ModelError
from .options import RECIPES, Bias, Drift, Finetune, Slopes, parse
from .report import PLOTS, finetune_line, write_table
from .rounding import bias, drift, survival
from .runs import load_problem, run
from .slopes import slopes


def bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def measure_finetuning(options: Finetune, progress: Progress) -> dict[str, Any]:
    """Every recipe at every rate with every seed: results by rate, recipe and seed."""
    console = progress.console
    problem = load_problem(options)
    result: dict[str, Any] = {"problem": problem.name, "rates": {}}
    for lr in options.lr:
        for seed in options.seeds:
            for name in options.recipes:
                text = f"{name}, rate {lr:g}, seed {seed}"
                bar = progress.add_task(text, total=options.steps)

                def advance(bar: Any = bar) -> None:
                    progress.advance(bar)

                one = run(problem, RECIPES[name], lr, seed, options, advance)
                progress.remove_task(bar)
                rate = result["rates"].setdefault(f"{lr:g}", {})
                rate.setdefault(name, {})[str(seed)] = one
                console.print(finetune_line(name, lr, seed, one), highlight=False, soft_wrap=True)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    options, parser = parse(argv)
    console = Console()
    with bars(console) as progress:

        def track(steps: Any, text: str) -> Any:
            if not console.is_terminal:
                console.print(text, highlight=False)
            return progress.track(steps, description=text)

        try:
            if isinstance(options, Finetune):
                result = measure_finetuning(options, progress)
            elif isinstance(options, Drift):
                result = drift(options, track)
            elif isinstance(options, Bias):
                result = bias(options, track)
            elif isinstance(options, Slopes):
                result = slopes(options, track)
            else:
                result = survival(options, track)
        except (DataError, ModelError) as error:
            parser.error(str(error))
    settings = {**dataclasses.asdict(options), "threads": torch.get_num_threads()}
    for key in ("out", "data", "model"):  # where things lay is nobody's business
        if settings.get(key) is not None:
            settings[key] = Path(str(settings[key])).name
    content = {
        "command": options.command,
        "result": result,
        "settings": settings,
        "versions": versions(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, default=str) + "\n"
    (options.out / f"{options.name}.json").write_text(text, encoding="utf-8")
    PLOTS[options.command](options.out / f"{options.name}.png", content)
    console.print(write_table(options.out), highlight=False, soft_wrap=True, markup=False)
    console.print(f"Results, plots and table: {options.out}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
