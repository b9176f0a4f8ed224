"""Settings of one run of `finetune.py`, and the command lines that make them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from .heads import HEADS
from .methods import METHODS, AdapterOptions, Method
from .models import DEFAULT_MODEL_PACKAGE, ModelError
from .presets import FOUND, PAPER, preset
from .tasks import DEV, TASKS, TEST, TRAIN

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """All that decides the outcome of a run, beside the versions of the packages."""

    model: str
    task: str
    method: str
    seed: int
    lr_zo: float | None = None
    lr_fo: float | None = None
    mu: float = 1e-3
    estimator: str = "two_sided"
    samples: int = 1
    distribution: str = "gaussian"
    include: tuple[str, ...] = ()
    optimizer: str = "adamw"
    schedule: str = "linear"
    steps: int = 200
    batch_size: int = 16
    eval_every: int = 20
    patience: int = 0
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    head: str = "random"
    dropout: bool = False
    dtype: str = "float32"
    data: str = ""
    data_seed: int = 0
    train_size: int = TRAIN
    dev_size: int = DEV
    test_size: int = TEST


def number(
    kind: Callable[[str], float], least: float, *, above: bool = False, below: float = math.inf
) -> Callable[[str], Any]:
    """An argparse type: a number of `kind`, at least (or above) `least`, below `below`."""
    rule = f"must be {'an integer' if kind is int else 'a number'}"
    rule += f" {'above' if above else 'of at least'} {least}"
    rule += "" if below == math.inf else f" and below {below}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > least if above else value >= least) or not value < below:
            raise argparse.ArgumentTypeError(f"{rule}, got {text!r}")
        return value

    return parse


def task_name(text: str) -> str:
    if text not in TASKS:
        raise argparse.ArgumentTypeError(f"unknown task {text!r}; known tasks: {', '.join(TASKS)}")
    return text


def pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"must be a regular expression, got {text!r} ({error})"
        ) from error
    return text


def device_name(text: str) -> str:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"must be a device torch can use here, got {text!r}"
        ) from error
    return name


_TAKEN = {field.name for field in fields(Settings)} - {"model", "task", "method", "seed", "adapter"}


def parser(description: str, out: Path) -> argparse.ArgumentParser:
    """What `finetune.py` and `compare.py` share. Options without default come from a preset."""
    p = argparse.ArgumentParser(
        description=description,
        epilog="Methods: zo trains the whole model, or --include, by zeroth order; fo-ADAPTER an "
        "adapter by first order; hybrid-ADAPTER both. Presets are for "
        f"{', '.join([*FOUND, *PAPER])} (presets.py); other models need --lr-zo and --lr-fo, and "
        "have the defaults of Settings in options.py.",
    )

    own = {name.replace("_", "-") for name in _TAKEN} - {"data", "head"}

    def add(flag: str, text: str, **options: Any) -> None:
        shown = " (default: %(default)s)" if options.get("default") not in (None, [], False) else ""
        if "default" not in options and flag[2:] in own:
            shown = " (default: the model's preset)"
        p.add_argument(flag, help=text + shown, **options)

    count, rate = number(int, 1), number(float, 0)
    add("--model", f"hub id or folder; default: MiniLM from the package {DEFAULT_MODEL_PACKAGE}")
    add(
        "--data",
        "folder with the task's files, or with a folder of its name; or hub. Default: the folder "
        "in the environment variable ZOFO_DATA; for the task sentiment, the demo data",
    )
    add("--methods", "what to compare", nargs="+", choices=METHODS, default=list(METHODS))
    seed = number(int, 0)
    add("--seeds", "of data order, adapter, directions", type=seed, nargs="+", default=[0])
    add("--steps", "optimizer steps of each run, at most", type=count)
    add("--batch-size", "examples a step", type=count)
    add("--train-size", "training examples", type=count, default=TRAIN)
    add("--dev-size", "examples to choose the best weights by", type=count, default=DEV)
    add("--test-size", "examples of the final scores", type=count, default=TEST)
    add("--data-seed", "draws the examples", type=number(int, 0), default=0)
    add("--eval-every", "steps between evaluations", type=count)
    add("--patience", "stop after so many without a lower loss; 0: never", type=number(int, 0))
    add("--lr-zo", "learning rate of zeroth order", type=rate)
    add("--lr-fo", "learning rate of the adapter and head", type=rate)
    add("--optimizer", "of the adapter and head", choices=("adamw", "sgd"))
    add("--schedule", "of both learning rates", choices=("linear", "constant"))
    add("--mu", "perturbation step size", type=number(float, 0, above=True))
    add("--estimator", "of the projected gradient", choices=("two_sided", "one_sided"))
    add("--samples", "directions averaged in a step", type=count)
    add("--distribution", "of the directions", choices=("gaussian", "rademacher"))
    add(
        "--include",
        "what zeroth order trains, as patterns of parameter names; none: everything",
        nargs="*",
        type=pattern,
        metavar="PATTERN",
    )
    add("--lora-rank", "LoRA's alpha is twice the rank", type=count, default=8)
    add("--lora-targets", "modules LoRA goes to; none: peft's choice", nargs="*", default=[])
    add("--lora-layers", "its layers; none: all", type=number(int, 0), nargs="*", default=[])
    add("--lora-dropout", "dropout before LoRA", type=number(float, 0, below=1), default=0.0)
    add("--tokens", "virtual tokens of prompt and prefix tuning", type=count, default=5)
    add(
        "--head",
        "first head of an encoder: zero-shot prompts, a probe fitted on its features, or random; "
        "default: prompts where the task has some",
        choices=HEADS,
    )
    add(
        "--dropout",
        "train with the model's own dropout",
        action=argparse.BooleanOptionalAction,
        default=False,
    )
    add("--dtype", "of the base model", choices=DTYPES, default="float32")
    add("--device", "auto: cuda where there is one, else cpu", type=device_name, default="auto")
    add("--report-to", "the Trainer's reports: tensorboard, wandb, ...", nargs="+", default=[])
    add("--no-save", "keep results only, no weights", action="store_true")
    add("--overwrite", "throw away runs in --out made by other settings", action="store_true")
    add("--out", "folder for everything written; runs there are resumed", type=Path, default=out)
    return p


def settings(args: argparse.Namespace, task: str, method: str, seed: int, **fixed: Any) -> Settings:
    """Of one run: what the command line says, else the preset, else the default.

    Raises:
        ModelError: a learning rate is neither given nor in a preset.
    """
    given = {
        name: value
        for name, value in vars(args).items()
        if name in _TAKEN and value is not None and name != "include"
    }
    if args.include is not None:
        given["include"] = tuple(args.include)
    chosen: Mapping[str, Any] = {**preset(args.model, method, task), **given, **fixed}
    needed = {"lr_zo": METHODS[method].zo_base, "lr_fo": METHODS[method].adapter is not None}
    for name, needs in needed.items():
        if needs and name not in chosen:
            flag = "--" + name.replace("_", "-")
            raise ModelError(f"{method} has no preset for the model {args.model!r}: give {flag}")
    adapter = AdapterOptions(
        rank=args.lora_rank,
        dropout=args.lora_dropout,
        targets=tuple(args.lora_targets),
        layers=tuple(args.lora_layers),
        tokens=args.tokens,
    )
    return Settings(
        args.model,
        task,
        method,
        seed,
        adapter=_own(adapter, METHODS[method]),
        **{name: value for name, value in chosen.items() if name not in _unused(METHODS[method])},
    )


def _unused(method: Method) -> set[str]:
    """Settings that make no difference to a method, so that changing them changes no run."""
    unused = set() if method.adapter is not None else {"lr_fo", "optimizer"}
    if not method.zo_base:
        unused |= {"lr_zo", "mu", "estimator", "samples", "distribution", "include"}
    return unused


def _own(adapter: AdapterOptions, method: Method) -> AdapterOptions:
    if method.adapter == "lora":
        return replace(adapter, tokens=AdapterOptions.tokens)
    return AdapterOptions(tokens=adapter.tokens) if method.adapter else AdapterOptions()
