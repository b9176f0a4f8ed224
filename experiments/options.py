"""Command lines as dataclasses, which transformers' HfArgumentParser fills."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from transformers import HfArgumentParser

from zofo_kernels import STRUCTURES
from zofo_optim.rules import RULES
from zofo_optim.settings import DIRECTIONS, PERTURBATIONS

from .heads import HEADS
from .methods import METHODS, PAPER_METHODS
from .models import DEFAULT_MODEL_PACKAGE
from .own_data import OWN
from .presets import FOUND, PAPER
from .tasks import DEV, TASKS, TEST, TRAIN

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EVERYTHING = "."
TEMPLATE = "{text}\nLabel:"
OUT = "folder for everything written; runs there are resumed"

Kind = TypeVar("Kind")


class OptionError(ValueError):
    """A value on the command line is out of its range; the message says which, and the rule."""


def option(default: Any, text: str, **more: Any) -> Any:
    """A field with what `argparse` is told of it: help, and perhaps choices and metavar."""
    shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    shown = "" if shown in ("", "None", "False") else f" (default: {shown})"
    told = {"help": text + shown, **more}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=told)
    return field(default=default, metadata=told)


def some_of(parts: Sequence[str]) -> str:
    """Of a command whose parts may be named first; see :func:`commands.parts_first`."""
    return f"some of {', '.join(parts)}; also as first words of the command line"


@dataclass(frozen=True)
class Range:
    """Numbers at least, or above, one bound, and below another."""

    least: float
    above: bool = False
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        high_enough = value > self.least if self.above else value >= self.least
        return high_enough and value < self.below

    def __str__(self) -> str:
        text = f"{'above' if self.above else 'at least'} {self.least:g}"
        return text if self.below == math.inf else f"{text} and below {self.below:g}"


COUNT, INDEX, RATE, POSITIVE = Range(1), Range(0), Range(0), Range(0, above=True)


def check_ranges(options: Any, ranges: Mapping[str, Range]) -> None:
    """Numbers, and the numbers in lists, must lie in their ranges; None may stand for any.

    Raises:
        OptionError: one does not.
    """
    for name, allowed in ranges.items():
        found = getattr(options, name)
        for value in found if isinstance(found, list) else [found]:
            if value is not None and value not in allowed:
                rule = "finite" if value == math.inf else allowed
                raise OptionError(f"{flag(name)} must be {rule}, got {value}")


def flag(name: str) -> str:
    """ "lr_zo" to "--lr-zo"."""
    return "--" + name.replace("_", "-")


def check_task(name: str) -> None:
    """
    Raises:
        OptionError: there is no such task.
    """
    known = (*TASKS, OWN)
    if name not in known:
        raise OptionError(f"unknown task {name!r}; known tasks: {', '.join(known)}")


def check_device(name: str) -> None:
    """
    Raises:
        OptionError: torch has no such device here.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device must be a device torch can use here, got {name!r}") from error


def check_pattern(text: str) -> None:
    """
    Raises:
        OptionError: it is no regular expression.
    """
    try:
        re.compile(text)
    except re.error as error:
        raise OptionError(
            f"--include must be regular expressions, got {text!r} ({error})"
        ) from error


def check_template(text: str) -> None:
    """
    Raises:
        OptionError: it has no place for the text, or other places than for text and pair.
    """
    try:
        filled = text.format(text="\0", pair="")
    except (KeyError, IndexError, ValueError) as error:
        raise OptionError(
            f"--template must have no places but {{text}} and {{pair}}, got {text!r}"
        ) from error
    if "\0" not in filled:
        raise OptionError(f"--template must have a place {{text}}, got {text!r}")


@dataclass
class Options:
    """What `finetune` and `compare` share. What is None comes from the model's preset."""

    model: str | None = option(
        None, f"hub id or folder; default: MiniLM from the package {DEFAULT_MODEL_PACKAGE}"
    )
    data: str | None = option(
        None,
        "folder with the task's files, or with a folder of its name; or hub; or, for "
        f"{OWN}, a CSV, TSV or JSONL file or a folder of train, dev and test files. Default: the "
        "folder in the environment variable ZOFO_DATA; for the task sentiment, the demo data",
    )
    text_column: str = option("text", f"of your own data ({OWN})")
    pair_column: str | None = option(None, "of a second text, if there is one")
    label_column: str = option("label", "of your own data; labels are texts or numbers")
    template: str = option(
        TEMPLATE,
        "of the prompt for your own data, which the name of a label follows; {text}, {pair}. "
        "For causal language models",
    )
    methods: list[str] = option(
        list(PAPER_METHODS), "what to compare", choices=tuple(METHODS), metavar="METHOD"
    )
    seeds: list[int] = option([0], "of data order, adapter, directions")
    steps: int | None = option(None, "optimizer steps of each run, at most")
    batch_size: int | None = option(None, "examples a step")
    train_size: int = option(TRAIN, "training examples, at most")
    dev_size: int = option(DEV, "examples to choose the best weights by, at most")
    test_size: int = option(TEST, "examples of the final scores, at most")
    data_seed: int = option(0, "draws the examples")
    eval_every: int | None = option(None, "steps between evaluations")
    patience: int | None = option(None, "stop after so many without a lower loss; 0: never")
    lr_zo: float | None = option(None, "learning rate of zeroth order")
    lr_fo: float | None = option(None, "learning rate of the adapter and head")
    optimizer: str | None = option(None, "of the adapter and head", choices=("adamw", "sgd"))
    schedule: str | None = option(None, "of both learning rates", choices=("linear", "constant"))
    mu: float | None = option(None, "perturbation step size")
    estimator: str | None = option(
        None, "of the projected gradient", choices=("two_sided", "one_sided")
    )
    samples: int | None = option(None, "directions averaged in a step")
    distribution: str | None = option(None, "of the directions", choices=("gaussian", "rademacher"))
    structure: str | None = option(
        None, "of directions: all elements of a matrix, or factors", choices=tuple(STRUCTURES)
    )
    rank: int | None = option(None, "of low-rank directions")
    directions: str | None = option(
        None,
        "shared by the batch, or one for each example, which implies --structure low_rank, "
        "--perturbation streamed and --samples 1",
        choices=DIRECTIONS,
    )
    perturbation: str | None = option(
        None, "whether weights are moved, or torch functions see moved ones", choices=PERTURBATIONS
    )
    zo_rule: str | None = option(
        None, "what a zeroth-order update makes of the slopes", choices=tuple(RULES)
    )
    include: list[str] | None = option(
        None,
        f"what zeroth order trains, as patterns of parameter names; {EVERYTHING!r}: everything",
        metavar="PATTERN",
    )
    lora_rank: int = option(8, "LoRA's alpha is twice the rank")
    lora_targets: list[str] = option([], "modules LoRA goes to; default: peft's choice")
    lora_layers: list[int] = option([], "its layers; default: all")
    lora_dropout: float = option(0.0, "dropout before LoRA")
    tokens: int = option(5, "virtual tokens of prompt and prefix tuning")
    head: str | None = option(
        None,
        "first head of an encoder: zero-shot prompts, a probe fitted on its features, or random; "
        f"default: prompts where the task has some, a probe for {OWN}",
        choices=HEADS,
    )
    dropout: bool = option(False, "train with the model's own dropout")
    dtype: str = option("float32", "of the base model", choices=tuple(DTYPES))
    device: str = option("auto", "auto: cuda where there is one, else cpu")
    report_to: list[str] = option([], "the Trainer's reports: tensorboard, wandb, ...")
    no_save: bool = option(False, "keep results only, no weights")
    overwrite: bool = option(False, "throw away runs in --out made by other settings")
    out: Path = option(Path("runs"), OUT)

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        check_device(self.device)
        for pattern in self.include or ():
            check_pattern(pattern)
        if self.include == [EVERYTHING]:
            self.include = []
        check_template(self.template)


RANGES = {
    **dict.fromkeys(("seeds", "data_seed", "patience", "lora_layers"), INDEX),
    **dict.fromkeys(("steps", "batch_size", "train_size", "dev_size", "test_size"), COUNT),
    **dict.fromkeys(("eval_every", "samples", "rank", "lora_rank", "tokens"), COUNT),
    **dict.fromkeys(("lr_zo", "lr_fo"), RATE),
    "mu": POSITIVE,
    "lora_dropout": Range(0, below=1),
}

EPILOG = (
    "Methods: zo trains the whole model, or --include, by zeroth order; fo-ADAPTER an adapter by "
    "first order; hybrid-ADAPTER both; fo everything by first order. What has no default shown "
    f"comes from the preset of the model. Presets are for {', '.join([*FOUND, *PAPER])} "
    "(presets.py); other models need --lr-zo and --lr-fo, and have the defaults of Settings in "
    "settings.py."
)


def _default(one: Field[Any]) -> Any:
    make = one.default_factory
    return one.default if make is MISSING else make()


class Parser(HfArgumentParser):
    """Its errors are the message and where to read on: the usage alone would fill a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists the options.\n")


def parse(
    kind: type[Kind],
    name: str,
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    fixed: Collection[str] = (),
    epilog: str | None = None,
) -> tuple[Kind, Any]:
    """The options on a command line, and the parser, whose `error` ends the program.

    Values out of their ranges end it, too; and options that are `fixed`, which are not in its help.
    The help ends with `epilog`, by default that of all commands that fine-tune.
    """
    parser = Parser(
        kind,  # type: ignore[arg-type]
        prog=f"python -m {name}",
        description=description,
        epilog=EPILOG if epilog is None else epilog,
        formatter_class=argparse.HelpFormatter,
    )
    for action in parser._actions:
        if action.dest in fixed:
            action.help = argparse.SUPPRESS
    try:
        found, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except OptionError as error:
        parser.error(str(error))
    for one in fields(found):
        if one.name in fixed and getattr(found, one.name) != _default(one):
            parser.error(f"{flag(one.name)} cannot be given: this command sets it itself")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return found, parser
