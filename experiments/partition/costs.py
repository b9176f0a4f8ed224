"""What a step costs at each budget, without learning, beside full fine-tuning and LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from zofo_optim.whole import write_json

from ..choices import ChoiceData
from ..classification import Encoded, Example
from ..finetune import machine, versions
from ..forms import FORMS
from ..models import DEFAULT_MODEL_PACKAGE, Problem, load_model
from ..report import markdown
from . import plots
from .recipes import (
    ALL,
    COUPLING,
    GAUSSIAN,
    HEAD,
    LORA,
    PARTITION,
    PER_EXAMPLE,
    PLAIN,
    SAVINGS,
    TOP,
    Recipe,
    Saving,
    step_name,
)
from .steps import StepCost, measured

BUDGETS = tuple(round(0.1 * tenths, 1) for tenths in range(1, 10))
OF = ("flops", "memory")
ROWS, EXAMPLES = 8, 16
ROUNDS = 2

Costs = dict[str, dict[str, StepCost]]


class RandomTokens(ChoiceData):
    """Rows of random tokens, all of one length."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.labels, self.lengths, self._padding = [0] * rows, [length] * rows, 0
        ids = torch.randint(vocabulary, (rows, length), generator=draw).tolist()
        self.options = [[(row, length - 1)] for row in ids]


def llama(layers: int = 6, width: int = 256, length: int = 128) -> Problem:
    """An untrained Llama, its embeddings untied."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=int(width * 8 / 3),
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        use_cache=False,
        pad_token_id=0,
    )
    data = RandomTokens(EXAMPLES, length, config.vocab_size)
    made: Any = LlamaForCausalLM(config)
    return Problem(FORMS["sst2-sentences"], made, None, data, data, data)  # type: ignore[arg-type]


def minilm(length: int = 64) -> Problem:
    """Under a head of two labels, on rows of so many tokens."""
    model, tokenizer = load_model(DEFAULT_MODEL_PACKAGE, FORMS["sst2"], torch.float32)
    examples = [Example(((" ".join(["film"] * length),),), i % 2) for i in range(EXAMPLES)]
    data = Encoded(examples, tokenizer, torch.device("cpu"), max_length=length)
    return Problem(FORMS["sst2"], model, tokenizer, data, data, data)


MODELS: Mapping[str, Callable[[], Problem]] = {
    "llama-6x256, 8 x 128 tokens": llama,
    "all-minilm-l6-v2, 8 x 64 tokens": minilm,
}
"""What is measured, by the name of its tables."""


def steps(causal: bool, budgets: Sequence[float] = BUDGETS) -> Iterator[tuple[Recipe, Saving]]:
    """What is measured: those without a budget first."""
    for whole in (Recipe(ALL), Recipe(ALL, optimizer="sgd"), Recipe(LORA)):
        yield from ((whole, saving) for saving in SAVINGS)
    few = [Recipe(LORA, layers=layers) for layers in (1, 2, 3)]
    few += [Recipe(TOP), *[Recipe(HEAD)] * (not causal)]
    yield from ((recipe, PLAIN) for recipe in few)
    small = few[0] if causal else few[-1]
    for recipe in (
        Recipe(kind=GAUSSIAN),
        Recipe(kind=PER_EXAMPLE),
        replace(small, kind=PER_EXAMPLE),
    ):
        yield recipe, PLAIN
    for budget in (*budgets[::2], *budgets[1::2]):  # so that an interrupted table has them all over
        for of in OF:
            yield from partitions(of, budget)


def partitions(of: str, budget: float) -> Iterator[tuple[Recipe, Saving]]:
    """Ways to train within a budget, in the order of :data:`LINES`."""
    part = Recipe(PARTITION, of=of, budget=budget)
    yield part, PLAIN
    yield replace(part, kind=GAUSSIAN), PLAIN
    yield replace(part, kind=GAUSSIAN, coupling=COUPLING), PLAIN
    if of == "memory":
        yield part, Saving(in_backward=True)


LINES = (
    "rest frozen",
    f"rest by {GAUSSIAN}",
    f"rest by {GAUSSIAN}, coupling {COUPLING:g} (Hi-ZFO)",
    "rest frozen, in backward",
)


def measure(
    name: str, problem: Problem, out: Path, console: Console, budgets: Sequence[float] = BUDGETS
) -> None:
    """Those that are not in ``OUT/costs.json``, which is written after each."""
    file = out / "costs.json"
    kept: dict[str, Any] = {"models": {}}
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
    own: dict[str, StepCost] = kept["models"].setdefault(name, {})
    for recipe, saving in steps(problem.causal, budgets):
        step = step_name(recipe, saving)
        if step in own:
            continue
        own[step] = measured(
            problem,
            recipe,
            saving,
            batch=ROWS,
            count=1,
            rounds=ROUNDS,
            profiled=1,
            partitions=out / "partitions" / name.split(",")[0],
        )
        kept.update(versions=versions(), machine=machine(torch.device("cpu")))
        write_json(file, kept)
        console.print(f"{name}: {step}: {_cell(own[step])}", highlight=False)


def _cell(cost: StepCost) -> str:
    return f"{1000 * cost['seconds']:.0f} ms, {cost['peak_bytes'] / 1e6:.0f} MB"


def read(out: Path) -> Costs:
    """By model and step; empty where nothing is measured."""
    file = out / "costs.json"
    found: Costs = json.loads(file.read_text(encoding="utf-8"))["models"] if file.is_file() else {}
    return found


def render(out: Path, costs: Costs) -> None:
    """Write ``costs.md`` and a plot for each model and kind of budget."""
    parts = [
        "# What a step costs\n",
        "Milliseconds of one thread, of the quicker of two steps, and the most that live tensors "
        "take, weights included. AdamW where SGD is not named. Without a budget:\n",
    ]
    for name, own in costs.items():
        parts += [f"## {name}\n", _table_without(own)]
        for of in OF:
            lines = by_budget(own, of)
            if not lines:
                continue
            parts.append(f"Budgets of {of}:\n\n{_table(own, lines)}\n{cheaper(own, of)}")
            plot = f"costs-{name.split(',')[0]}-{of}.png"
            plots.budgets(
                out / plot,
                {line: {b: _pair(own[s]) for b, s in at.items()} for line, at in lines.items()},
                {step: _pair(own[step]) for step in _levels(own)},
                f"{name}, budgets of {of}",
            )
            parts.append(f"![milliseconds and MB]({plot})\n")
    (out / "costs.md").write_text("\n".join(parts), encoding="utf-8")


def _pair(cost: StepCost) -> tuple[float, float]:
    return 1000 * cost["seconds"], cost["peak_bytes"] / 1e6


def _levels(own: Mapping[str, StepCost]) -> list[str]:
    shown = [(Recipe(ALL), PLAIN), (Recipe(ALL, optimizer="sgd"), SAVINGS[3])]
    shown += [(Recipe(LORA), PLAIN), (Recipe(LORA), SAVINGS[2]), (Recipe(LORA, layers=1), PLAIN)]
    return [name for name in (step_name(*step) for step in shown) if name in own]


def by_budget(own: Mapping[str, StepCost], of: str) -> dict[str, dict[float, str]]:
    """Names of steps that are measured, by line and budget."""
    lines: dict[str, dict[float, str]] = {}
    for budget in BUDGETS:
        for line, step in zip(LINES, partitions(of, budget), strict=False):
            if step_name(*step) in own:
                lines.setdefault(line, {})[budget] = step_name(*step)
    return lines


def _table_without(own: Mapping[str, StepCost]) -> str:
    rows = [["step", "ms", "peak MB"]]
    with_budget = {s for of in OF for at in by_budget(own, of).values() for s in at.values()}
    for name, cost in own.items():
        if name not in with_budget:
            milliseconds, megabytes = _pair(cost)
            rows.append([name, f"{milliseconds:.0f}", f"{megabytes:.1f}"])
    return markdown(rows)


def _table(own: Mapping[str, StepCost], lines: Mapping[str, Mapping[float, str]]) -> str:
    budgets = sorted({budget for at in lines.values() for budget in at})
    predicted = sorted(
        {key for at in lines.values() for s in at.values() for key in own[s]["predicted"]}
    )
    rows = [["budget", *predicted, *lines]]
    for budget in budgets:
        costs = [own[at[budget]] if budget in at else None for at in lines.values()]
        first = next(cost for cost in costs if cost is not None)
        told = [f"{first['predicted'][key]:.3g}" for key in predicted]
        rows.append([f"{budget:g}", *told, *("" if c is None else _cell(c) for c in costs)])
    return markdown(rows)


def cheaper(own: Mapping[str, StepCost], of: str) -> str:
    """In words: at which budgets a step takes less memory, or time, than others without one."""
    lines = by_budget(own, of)
    texts = []
    for name in _levels(own):
        for place, what in enumerate(("time", "memory")):
            level = _pair(own[name])[place]
            below = {
                line: [b for b, step in at.items() if _pair(own[step])[place] < level]
                for line, at in lines.items()
            }
            said = [f"{line}: {_list(some)}" for line, some in below.items()]
            texts.append(f"- less {what} than {name}: {'; '.join(said)}\n")
    return "".join(texts)


def _list(budgets: Sequence[float]) -> str:
    return ", ".join(f"{budget:g}" for budget in budgets) or "none"
