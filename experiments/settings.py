"""Settings of one run: what the command line says, else the preset, else the default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from zofo_optim.rules import RULES

from .methods import METHODS, AdapterOptions, Method
from .models import ModelError
from .options import Options, flag
from .own_data import OWN, Columns
from .presets import preset
from .tasks import DEV, TEST, TRAIN


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
    structure: str = "full"
    rank: int = 1
    directions: str = "shared"
    perturbation: str = "in_place"
    zo_rule: str = "sgd"
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
    columns: Columns | None = None
    """Of a user's own data; and the template of its prompts."""
    template: str | None = None


PER_EXAMPLE: dict[str, Any] = dict(structure="low_rank", perturbation="streamed", samples=1)
"""What a direction for each example needs."""
OF_ZEROTH_ORDER = {
    *("lr_zo", "mu", "estimator", "samples", "distribution", "zo_rule", "include"),
    *("structure", "rank", "directions", "perturbation"),
}
MADE = {"model", "task", "method", "seed", "adapter", "columns", "template", "include"}
"""Settings that are more than the option of their name."""
TAKEN = {one.name for one in fields(Settings)} - MADE


def settings(options: Options, task: str, method: str, seed: int, **fixed: Any) -> Settings:
    """Of one run: what the command line says, else the preset, else the default.

    Args:
        options: of the command line; `model` must be there.
        task, method, seed: of the run.
        fixed: settings that come before all.

    Raises:
        ModelError: a learning rate is neither given nor in a preset; or there are too few samples
            for the rule.
    """
    assert options.model is not None
    given = {name: value for name in TAKEN if (value := getattr(options, name)) is not None}
    if options.include is not None:
        given["include"] = tuple(options.include)
    if task == OWN:
        given["columns"] = Columns(options.text_column, options.pair_column, options.label_column)
        given["template"] = options.template
    given |= fixed
    zeroth_order, per_example = METHODS[method].zo_base, given.get("directions") == "per_example"
    needed_by = PER_EXAMPLE if zeroth_order and per_example else {}
    chosen: Mapping[str, Any] = {**preset(options.model, method, task), **needed_by, **given}
    needed = {"lr_zo": METHODS[method].zo_base, "lr_fo": METHODS[method].first_order}
    for name, needs in needed.items():
        if needs and name not in chosen:
            raise ModelError(
                f"{method} has no preset for the model {options.model!r}: give {flag(name)}"
            )
    for name, value in needed_by.items():
        if chosen[name] != value:
            raise ModelError(f"--directions per_example needs {flag(name)} {value}")
    if zeroth_order and chosen.get("rank", 1) != 1 and chosen.get("structure", "full") == "full":
        raise ModelError("--rank needs --structure low_rank")
    rule = chosen.get("zo_rule", Settings.zo_rule)
    least = RULES[rule].min_samples
    enough = per_example or chosen.get("samples", Settings.samples) >= least
    if zeroth_order and not enough:
        raise ModelError(
            f"--zo-rule {rule} compares the samples of a step: give --samples {least} or more"
        )
    adapter = AdapterOptions(
        rank=options.lora_rank,
        dropout=options.lora_dropout,
        targets=tuple(options.lora_targets),
        layers=tuple(options.lora_layers),
        tokens=options.tokens,
    )
    return Settings(
        options.model,
        task,
        method,
        seed,
        adapter=_own(adapter, METHODS[method]),
        **{name: value for name, value in chosen.items() if name not in _unused(METHODS[method])},
    )


def _unused(method: Method) -> set[str]:
    """Settings that make no difference to a method, so that changing them changes no run."""
    unused = set() if method.first_order else {"lr_fo", "optimizer"}
    return unused if method.zo_base else unused | OF_ZEROTH_ORDER


def _own(adapter: AdapterOptions, method: Method) -> AdapterOptions:
    if method.adapter == "lora":
        return replace(adapter, tokens=AdapterOptions.tokens)
    return AdapterOptions(tokens=adapter.tokens) if method.adapter else AdapterOptions()
