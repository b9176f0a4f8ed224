"""Fine-tune a pre-trained transformer with and without gradients, and compare.

    python -m experiments.finetune --out runs/finetune
    python -m experiments.finetune --task copa --data hub --model facebook/opt-125m \
        --lr-zo 1e-6 --lr-fo 1e-3 --methods zo fo-lora hybrid-lora --seeds 0 1 2

Methods, all from the same start, on the same batches in the same order for the same seed:

    zo                                       the whole model (or `--include`) learns by zeroth-order
                                             estimates; no backward pass at all
    fo-lora, fo-prompt, fo-prefix            the adapter learns by gradients; the base stays
    hybrid-lora, hybrid-prompt, hybrid-prefix  the same, while the base learns by zeroth order

Causal language models choose between texts by their mean log-likelihood; others classify with a new
head, which first order trains where there is an adapter. Training is transformers' Trainer's. Of
the evaluations made during training, the one with the lowest development loss gives the weights
that are tested and saved.

`OUT/TASK/METHOD/seed-N/` holds each run: an interrupted one goes on there from its last checkpoint,
a finished one is not run again. Its `result.json`:

    best             step, development loss, accuracy and F1, training loss of the best evaluation
    test             loss, accuracy and F1 (macro) of those weights on the test examples
    curve            the same as `best` for every evaluation, with the seconds spent in steps
    losses           mean training loss and projected gradient since the last entry
    steps, seconds, seconds_per_step         the median step; evaluations are not counted
    peak_memory_bytes   most bytes of live tensors in one step on the longest rows (measure.py)
    skipped_steps    steps whose estimates were not finite
    saved            folders of the trained weights

`OUT/TASK/` gets `results.json` and `curves.png` of all runs there. How to load saved weights is in
README.md here.

Needs: pip install "zofo-optim[examples]"
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .classification import LAYOUTS
from .heads import set_head
from .methods import METHODS
from .models import DEFAULT_MODEL_PACKAGE, ModelError, Problem, load_problem
from .options import DTYPES, Settings, parser, settings, task_name
from .plots import plot_curves
from .presets import guesses
from .report import Result, print_table
from .tasks import TASKS, DataError, default_source, protocol
from .training import RunError, finished, run, write


def versions() -> dict[str, str]:
    """Of what decides a run's outcome."""
    packages = ("zofo-optim", "torch", "transformers", "peft", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What the times were measured on."""
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "threads": torch.get_num_threads()}


def model_name(model: str) -> str:
    """A hub id, or the last part of a folder."""
    if model == DEFAULT_MODEL_PACKAGE:
        return model.removeprefix("gt-")
    return Path(model).name if Path(model).is_absolute() else model


def _place(text: str | None) -> str | None:
    """The one spelling of a folder; hub ids and the like stay."""
    return str(Path(text).resolve()) if text and Path(text).is_dir() else text


class Runs:
    """Runs of one command line; problems are loaded once a task."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self._console = args, console
        self.args.model = _place(args.model) or DEFAULT_MODEL_PACKAGE
        self.device = torch.device(args.device)
        self._problems: dict[str, Problem] = {}

    def settings(self, task: str, method: str, seed: int, **fixed: Any) -> Settings:
        """See :func:`options.settings`."""
        prompts = task in LAYOUTS and bool(LAYOUTS[task].prompts)
        given = {"head": self.args.head or ("prompts" if prompts else "random"), **fixed}
        data = _place(str(self.args.data or default_source(task)))
        return settings(self.args, task, method, seed, **{**given, "data": data})

    def run(self, wanted: Settings, folder: Path) -> Result:
        """One run in `folder`, made, finished or read there."""
        found = None
        try:
            found = finished(wanted, folder, weights=not self.args.no_save)
        except RunError:
            if not self.args.overwrite:
                raise
            shutil.rmtree(folder)
        return found or run(
            wanted,
            self.problem(wanted),
            folder,
            self._console,
            device=self.device,
            report_to=self.args.report_to,
            keep_weights=not self.args.no_save,
        )

    def problem(self, wanted: Settings) -> Problem:
        """The model with its first head, and the data; the same for all methods and seeds."""
        if wanted.task not in self._problems:
            sizes = (wanted.train_size, wanted.dev_size, wanted.test_size)
            rows = protocol(wanted.task, wanted.data, wanted.data_seed, *sizes)
            torch.manual_seed(wanted.data_seed)  # of a random head
            problem = load_problem(
                wanted.model,
                wanted.task,
                rows,
                dtype=DTYPES[wanted.dtype],
                device=self.device,
                dropout=wanted.dropout,
            )
            if not problem.causal:
                problem.base.to(self.device)
                set_head(problem, wanted.head)
                problem.base.to("cpu")
            self._problems[wanted.task] = problem
        return self._problems[wanted.task]

    def task(self, task: str) -> list[Result]:
        """All methods and seeds on one task; its table is printed, its files written."""
        args = self.args
        methods, seeds = dict.fromkeys(args.methods), dict.fromkeys(args.seeds)
        wanted = [self.settings(task, method, seed) for method in methods for seed in seeds]
        for note in (note for m in methods for note in guesses(args.model, m, task)):
            self._console.print(note, highlight=False, soft_wrap=True)
        for one in wanted:
            self.run(one, args.out / task / one.method / f"seed-{one.seed}")
        results = there(args.out, task)
        title = f"{model_name(args.model)} on {task}, batches of {wanted[0].batch_size}"
        title += f", {len(seeds)} seeds" if len(seeds) > 1 else ""
        write(
            args.out / task / "results.json",
            {"runs": results, "versions": versions(), "machine": machine(self.device)},
        )
        plot_curves(args.out / task / "curves.png", results, title)
        print_table(self._console, results, title)
        return results


def there(out: Path, task: str) -> list[Result]:
    """All finished runs of a task, by this command or an earlier one."""
    files = [
        file
        for method in METHODS
        for file in sorted(
            (out / task / method).glob("seed-*/result.json"),
            key=lambda file: int(file.parent.name.removeprefix("seed-")),
        )
    ]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(
        "Fine-tune a transformer by zeroth order, first order and both, and compare.",
        Path("runs/finetune"),
    )
    p.add_argument(
        "--task",
        type=task_name,
        default="sentiment",
        help=f"one of {', '.join(TASKS)} (default: %(default)s)",
    )
    args = p.parse_args(argv)
    console = Console()
    try:
        Runs(args, console).task(args.task)
    except (DataError, ModelError, RunError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on from the last checkpoint.")
        return 130
    what = "Results and curves" if args.no_save else "Results, curves and weights"
    console.print(f"{what}: {args.out / args.task}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
