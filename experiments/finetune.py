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
    untrained        test scores of the model that all methods start from
    head             the first head of an encoder
    skipped_steps    steps whose estimates were not finite
    saved            folders of the trained weights

`OUT/TASK/` gets `results.json` and `curves.png` of all runs there. How to load saved weights is in
README.md here.

Needs, in a checkout: pip install -e ".[experiments]"
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from zofo_optim.whole import write_json

from . import own_data
from .classification import LAYOUTS
from .commands import RESUMES, Ending
from .files import DataError
from .forms import FORMS, Form, own_form
from .heads import set_head
from .methods import METHODS
from .models import DEFAULT_MODEL_PACKAGE, Problem, load_problem, on
from .options import DTYPES, OUT, Options, check_task, option, parse
from .own_data import OWN
from .plots import plot_curves
from .presets import guesses
from .report import Result
from .settings import Settings, settings
from .summary import print_table
from .tasks import TASKS, Parts, default_source, protocol
from .training import RunError, finished, run


def versions(*more: str) -> dict[str, str]:
    """Of what decides a run's outcome, and of more packages."""
    packages = ("zofo-optim", "torch", "transformers", "peft", "numpy", *more)
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
    """The one spelling of a folder or file; hub ids and the like stay."""
    return str(Path(text).resolve()) if text and Path(text).exists() else text


class Runs:
    """Runs of one command line; problems are loaded once a task."""

    def __init__(self, options: Options, console: Console) -> None:
        self.options, self._console = options, console
        self.options.model = _place(options.model) or DEFAULT_MODEL_PACKAGE
        self.device = torch.device(options.device)
        self._problems: dict[str, Problem] = {}

    def settings(self, task: str, method: str, seed: int, **fixed: Any) -> Settings:
        """See :func:`settings.settings`."""
        given = {"head": self.options.head or first_head(task), **fixed}
        source = self.options.data
        if source is None:
            if task == OWN:
                raise DataError(f"{OWN} needs the data: --data FILE, or --data FOLDER")
            source = str(default_source(task))
        return settings(self.options, task, method, seed, **{**given, "data": _place(source)})

    def run(self, wanted: Settings, folder: Path, name: str = "") -> Result:
        """One run in `folder`, made, finished or read there; shown as `name`."""
        found = None
        try:
            found = finished(wanted, folder, weights=not self.options.no_save)
        except RunError:
            if not self.options.overwrite:
                raise
            shutil.rmtree(folder)
        return found or run(
            wanted,
            self.problem(wanted),
            folder,
            self._console,
            device=self.device,
            name=name,
            report_to=self.options.report_to,
            keep_weights=not self.options.no_save,
        )

    def problem(self, wanted: Settings) -> Problem:
        """The model with its first head, and the data; the same for all methods and seeds."""
        if wanted.task not in self._problems:
            parts, form = _data(wanted)
            torch.manual_seed(wanted.data_seed)  # of a random head
            problem = load_problem(
                wanted.model,
                form,
                parts,
                dtype=DTYPES[wanted.dtype],
                device=self.device,
                dropout=wanted.dropout,
            )
            if not problem.causal:
                with on(problem.base, self.device):
                    set_head(problem, wanted.head)
            self._problems[wanted.task] = problem
        return self._problems[wanted.task]

    def task(self, task: str) -> list[Result]:
        """All methods and seeds on one task; its table is printed, its files written."""
        given = self.options
        assert given.model is not None
        methods, seeds = list(dict.fromkeys(given.methods)), list(dict.fromkeys(given.seeds))
        wanted = [self.settings(task, method, seed) for method in methods for seed in seeds]
        for note in (note for m in methods for note in guesses(given.model, m, task)):
            self._console.print(note, highlight=False, soft_wrap=True)
        for one in wanted:
            name = f"method {methods.index(one.method) + 1} of {len(methods)}, {one.method}"
            if len(seeds) > 1:
                name += f", seed {seeds.index(one.seed) + 1} of {len(seeds)}"
            self.run(one, given.out / task / one.method / f"seed-{one.seed}", name)
        results = there(given.out, task)
        of = Path(wanted[0].data).name if task == OWN else task
        title = f"{model_name(given.model)} on {of}, batches of {wanted[0].batch_size}"
        title += f", {len(seeds)} seeds" if len(seeds) > 1 else ""
        write_json(
            given.out / task / "results.json",
            {"runs": results, "versions": versions(), "machine": machine(self.device)},
        )
        plot_curves(given.out / task / "curves.png", results, title)
        print_table(self._console, results, title)
        return results


def first_head(task: str) -> str:
    """Of an encoder, where the command line names none."""
    if task == OWN:
        return "probe"
    return "prompts" if task in LAYOUTS and LAYOUTS[task].prompts else "random"


def _data(wanted: Settings) -> tuple[Parts, Form]:
    """The rows of a run, and their form."""
    sizes = (wanted.train_size, wanted.dev_size, wanted.test_size)
    if wanted.columns is None:
        return protocol(wanted.task, wanted.data, wanted.data_seed, *sizes), FORMS[wanted.task]
    assert wanted.template is not None
    parts, labels = own_data.load(wanted.data, wanted.columns, wanted.data_seed, *sizes)
    return parts, own_form(labels, wanted.template)


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


@dataclass
class FinetuneOptions(Options):
    """The command line of `finetune`."""

    task: str | None = option(
        None,
        f"one of {', '.join((*TASKS, OWN))}; default: {OWN} where --data is a file, else sentiment",
    )
    out: Path = option(Path("runs/finetune"), OUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task is None:
            self.task = OWN if self.data and Path(self.data).is_file() else "sentiment"
        check_task(self.task)


def main(argv: Sequence[str] | None = None) -> int:
    about = "Fine-tune a transformer by zeroth order, first order and both, and compare."
    options, parser = parse(FinetuneOptions, "experiments.finetune", about, argv)
    assert options.task is not None
    console = Console()
    with Ending(parser, console, RESUMES) as ending:
        Runs(options, console).task(options.task)
    if ending.code:
        return ending.code
    what = "Results and curves" if options.no_save else "Results, curves and weights"
    console.print(f"{what}: {options.out / options.task}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
