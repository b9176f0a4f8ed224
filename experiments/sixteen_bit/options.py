"""The command lines of the 16-bit study."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import HfArgumentParser

from ..options import COUNT, INDEX, POSITIVE, OptionError, check_ranges, option

SIZES = [float(f"{m}e{e}") for e in range(-7, -3) for m in (1, 2, 5)] + [1e-3]


@dataclass(frozen=True)
class Recipe:
    """The weights' dtype, and how they are perturbed and updated; None: MeZO's recipe."""

    dtype: str
    perturbation: str | None = "in_place"
    rounding: str = "stochastic"


RECIPES = {
    "fp32": Recipe("fp32"),
    "bf16 in place": Recipe("bf16"),
    "bf16 streamed": Recipe("bf16", "streamed"),
    "bf16 nearest": Recipe("bf16", rounding="nearest"),
    "fp32 MeZO's recipe": Recipe("fp32", None),
    "bf16 MeZO's recipe": Recipe("bf16", None),
    "fp16 in place": Recipe("fp16"),
    "fp16 MeZO's recipe": Recipe("fp16", None),
}
DEFAULT_RECIPES = [name for name, recipe in RECIPES.items() if recipe.dtype != "fp16"]


COUNTS = ("count", "steps", "repeats", "batch_size", "train_size", "dev_size", "min_words")
RANGES = {
    **dict.fromkeys(("mu", "sigma", "sizes", "around", "lr"), POSITIVE),
    **dict.fromkeys(("seed", "seeds"), INDEX),
    **dict.fromkeys((*COUNTS, "eval_every"), COUNT),
}


@dataclass
class Common:
    """What all have."""

    command: ClassVar[str]

    out: Path = option(Path("runs/16-bit"), "folder for everything written")
    name: str = option("", "of the files; default: the command's")
    mu: float = option(1e-3, "perturbation step size")

    def __post_init__(self) -> None:
        check_ranges(self, {name: RANGES[name] for name in vars(self) if name in RANGES})
        self.name = self.name or self.command


@dataclass
class Weights(Common):
    """Weights that no model needs."""

    count: int = option(2**16, "weights")
    sigma: float = option(0.02, "standard deviation of the weights")
    seed: int = option(0, "of weights and directions")


@dataclass
class Drift(Weights):
    """How far weights wander under a constant loss."""

    command = "drift"

    steps: int = option(20_000, "steps")


@dataclass
class Survival(Weights):
    """How much of a small update is left."""

    command = "survival"

    count: int = option(2**20, "weights")
    sizes: list[float] = option(SIZES, "RMS sizes of the update")
    repeats: int = option(5, "directions averaged over")


@dataclass
class Bias(Common):
    """How much of a gradient the estimates hold, by the weights' size."""

    command = "bias"

    count: int = option(2**16, "weights of each size")
    around: list[float] = option([2.0**e for e in range(-9, 4)], "sizes: weights of 1 to 2 times")
    repeats: int = option(5, "directions averaged over")
    seed: int = option(0, "of weights and directions")


@dataclass
class OfAModel(Common):
    """Commands that take a model and a task's sentences."""

    model: str | None = option(None, "hub id or folder; default: the packaged MiniLM")
    text: bool = option(False, "language modelling on the task's sentences")
    task: str = option("sentiment", "whose sentences", choices=("sentiment", "sst2"))
    data: str | None = option(
        None, "folder with train.tsv and dev.tsv, or hub; default: as finetune.py"
    )
    batch_size: int = option(16, "examples a step")
    train_size: int = option(1000, "use the first so many training examples")
    dev_size: int = option(256, "use the first so many development examples")
    min_words: int = option(6, "--text: leave shorter sentences out")


@dataclass
class Slopes(OfAModel):
    """How slopes in 16 bits differ from those in fp32."""

    command = "slopes"

    repeats: int = option(200, "directions")
    distribution: str = option("gaussian", "of them", choices=("gaussian", "rademacher"))
    seed: int = option(0, "of the first direction")


@dataclass
class Finetune(OfAModel):
    """The same fine-tuning in fp32 and in 16 bits."""

    command = "finetune"

    recipes: list[str] = option(
        DEFAULT_RECIPES, "what to compare", choices=tuple(RECIPES), metavar="RECIPE"
    )
    lr: list[float] = option([1e-4], "learning rates")
    schedule: str = option("constant", "of the rates", choices=("constant", "linear"))
    steps: int = option(100, "steps of each run")
    eval_every: int = option(25, "steps between evaluations")
    seeds: list[int] = option([0], "of data order and directions")
    include: list[str] = option([], "train these parameters, by pattern; default: all")


KINDS: dict[str, type[Common]] = {
    kind.command: kind for kind in (Drift, Survival, Bias, Slopes, Finetune)
}


def parse(arguments: Sequence[str] | None = None) -> tuple[Any, argparse.ArgumentParser]:
    """The options of the command that is named first, and its parser.

    A command line that cannot be used ends the program.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sixteen_bit",
        description="What 16-bit weights do to zeroth-order training.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
    own: dict[str, argparse.ArgumentParser] = {}
    for name, kind in KINDS.items():
        own[name] = commands.add_parser(
            name,
            help=(kind.__doc__ or "").lower().rstrip("."),
            dataclass_types=kind,
            formatter_class=argparse.HelpFormatter,
        )
    found = vars(parser.parse_args(arguments))
    command = found.pop("command")
    try:
        return KINDS[command](**found), own[command]
    except OptionError as error:
        own[command].error(str(error))
