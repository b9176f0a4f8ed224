"""The command line of `finetune.py`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from heads import HEADS
from models import DEFAULT_MODEL_PACKAGE, METHODS
from tasks import TASKS

DEMO_DATA = Path(__file__).resolve().parent / "data"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def device_name(text: str) -> str:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"must be a device torch can use here, got {text!r}"
        ) from error
    return name


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Fine-tune a transformer by zeroth order, first order and both, and compare.",
    )

    def add(flag: str, text: str, **options: Any) -> None:
        shown = " (default: %(default)s)" if options.get("default") else ""
        p.add_argument(flag, help=text + shown, **options)

    count, rate = number(int, 1), number(float, 0)
    add("--model", f"hub id or folder; default: MiniLM from the package {DEFAULT_MODEL_PACKAGE}")
    add("--task", f"one of {', '.join(TASKS)}", type=task_name, default="sentiment")
    add(
        "--data",
        "folder with train.tsv and dev.tsv, or one file to split; default: the demo data",
        type=Path,
    )
    add("--methods", "what to compare", nargs="+", choices=METHODS, default=list(METHODS))
    add("--steps", "optimizer steps of each method", type=count, default=200)
    add("--batch-size", "examples a step", type=count, default=16)
    add("--train-size", "use the first so many training examples", type=count)
    add("--dev-size", "use the first so many dev examples", type=count)
    add("--eval-every", "steps between evaluations", type=count, default=20)
    add(
        "--patience",
        "stop after so many evaluations without a better accuracy; 0: never",
        type=number(int, 0),
        default=8,
    )
    add("--seed", "of data order, LoRA, dropout, directions", type=number(int, 0), default=0)
    add("--seeds", "several runs; overrides --seed", type=number(int, 0), nargs="+")
    add(
        "--head",
        "the head all methods start from: zero-shot prompts, or a probe fitted on the features",
        choices=HEADS,
        default="prompts",
    )
    add(
        "--schedule",
        "of the learning rates: linear to 0, or constant",
        choices=("linear", "constant"),
        default="linear",
    )
    add("--lr-zo", "zo: learning rate", type=rate, default=0.1)
    add("--lr-fo", "fo-lora: learning rate", type=rate, default=3e-3)
    add("--lr-hybrid-zo", "hybrid-lora: learning rate of the base", type=rate, default=3e-3)
    add("--lr-hybrid-fo", "hybrid-lora: learning rate of LoRA and head", type=rate, default=3e-3)
    add("--mu", "perturbation step size", type=number(float, 0, above=True), default=1e-3)
    add(
        "--estimator",
        "of the zeroth-order slope",
        choices=("two_sided", "one_sided"),
        default="two_sided",
    )
    add("--samples-zo", "zo: directions averaged in a step", type=count, default=4)
    add("--samples-hybrid", "hybrid-lora: directions averaged in a step", type=count, default=1)
    add(
        "--distribution",
        "of the directions",
        choices=("gaussian", "rademacher"),
        default="gaussian",
    )
    add("--lora-rank", "LoRA's alpha is twice the rank", type=count, default=8)
    add("--lora-targets", "modules LoRA goes to; none: peft's choice", nargs="*", default=[])
    add(
        "--lora-layers",
        "layers LoRA goes to; none: all",
        type=number(int, 0),
        nargs="*",
        default=[],
    )
    add("--lora-dropout", "dropout before LoRA", type=number(float, 0, below=1), default=0.0)
    add(
        "--dropout",
        "train with the model's own dropout",
        action=argparse.BooleanOptionalAction,
        default=False,
    )
    attention = r"(query|key|value)\.(base_layer\.)?bias"  # base_layer: inside peft's LoRA
    for method, patterns in (("zo", [attention, "classifier"]), ("hybrid", [attention])):
        add(
            f"--include-{method}",
            f"{method}: what zeroth order trains, as patterns of parameter names; none: everything",
            nargs="*",
            default=patterns,
            metavar="PATTERN",
        )
    add("--dtype", "of the weights", choices=DTYPES, default="float32")
    add("--device", "auto: cuda where there is one, else cpu", type=device_name, default="auto")
    add("--out", "folder for everything written", type=Path, default=Path("runs/finetune"))
    return p
