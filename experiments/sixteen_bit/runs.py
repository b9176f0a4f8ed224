"""Zeroth-order fine-tuning of one model in fp32 and in 16 bits, by several recipes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.zofo_bench.mezo import MeZO
from zofo_optim import HybridZOFO, hybrid_param_groups

from ..classification import LAYOUTS, Batch, Encoded, Example, classification_loss, evaluate
from ..forms import FORMS
from ..heads import set_prompt_head
from ..models import ModelError, default_model, load_model
from ..tasks import default_source, read
from .options import Finetune, OfAModel, Recipe
from .rounding import DTYPES, PRIME

Step = Callable[[Callable[[], Tensor], float], Any]

EVAL_BATCH = 64
LOSS_EXAMPLES = 256
MAX_LENGTH = 64
CPU = torch.device("cpu")


@dataclass
class Problem:
    """A pre-trained model, its data and its loss."""

    name: str
    base: Any
    train: Encoded
    dev: Encoded
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module, Iterable[Batch]], dict[str, float]]


def language_loss(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the next token, in float32 whatever the weights are; padding left out."""
    mask = batch["attention_mask"]
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
    targets = batch["input_ids"].masked_fill(mask == 0, -100)[:, 1:]
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction=reduction
    )


@torch.no_grad()
def evaluate_language(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss a token."""
    loss, tokens = 0.0, 0
    for batch in batches:
        loss += float(language_loss(model, batch, "sum"))
        tokens += int(batch["attention_mask"][:, 1:].sum())
    return {"loss": loss / tokens}


def evaluate_classes(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    scores = evaluate(model, batches)
    return {"loss": scores.loss, "accuracy": scores.accuracy}


def load_problem(options: OfAModel) -> Problem:
    """The classification task or, with `--text`, its sentences as language modelling."""
    source = options.data or default_source(options.task)
    rows = [read(options.task, source, split) for split in ("train", "dev")]
    parts = [FORMS["sst2"].examples(part) for part in rows]
    if options.text:
        if options.model is None:
            raise ModelError("--text needs a causal language model: name one with --model")
        parts = [[e for e in part if _words(e) >= options.min_words] for part in parts]
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
            base: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the model {options.model!r}: {error}") from error
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    else:
        torch.manual_seed(0)
        base, tokenizer = load_model(options.model or default_model(), FORMS["sst2"], torch.float32)
    train, dev = (
        Encoded(part[:size], tokenizer, CPU, MAX_LENGTH)
        for part, size in zip(parts, (options.train_size, options.dev_size), strict=True)
    )
    if options.text:
        return Problem("language model", base, train, dev, language_loss, evaluate_language)
    prompts = LAYOUTS["sst2"].prompts
    set_prompt_head(base, tokenizer, prompts, train.fixed_batches(EVAL_BATCH))
    return Problem("classifier", base, train, dev, classification_loss, evaluate_classes)


def _words(example: Example) -> int:
    return len(example.rows[0][0].split())


def shuffled_batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Random reshuffling without end: every example once an epoch, a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        yield from (order[i : i + size] for i in range(0, count, size))


def stepper(recipe: Recipe, groups: list[dict[str, Any]], seed: int) -> Step:
    """A function of the closure and the learning rate that makes one step."""
    if recipe.perturbation is None:
        parameters = [p for group in groups for p in group["params"]]
        mezo = MeZO(parameters, lambda: torch.zeros(()), lr=0.0, eps=groups[0]["mu"])
        mezo.seed = seed * PRIME

        def mezo_step(closure: Callable[[], Tensor], lr: float) -> Any:
            mezo.closure, mezo.lr = closure, lr
            return mezo.step()

        return mezo_step
    optimizer = HybridZOFO(
        groups, perturbation=recipe.perturbation, rounding=recipe.rounding, seed=seed
    )

    def step(closure: Callable[[], Tensor], lr: float) -> Any:
        for group in optimizer.param_groups:
            group["lr"] = lr
        return optimizer.step(closure)

    return step


def run(
    problem: Problem,
    recipe: Recipe,
    lr: float,
    seed: int,
    options: Finetune,
    advance: Callable[[], Any],
) -> dict[str, Any]:
    """One run: losses on the training and dev set every so often, and seconds a step.

    The clock runs in steps only, and leaves out the first, which may compile.
    """
    base = copy.deepcopy(problem.base).to(DTYPES[recipe.dtype])
    model = base.requires_grad_(False).eval()
    try:
        groups = hybrid_param_groups(
            model, zo={"lr": lr, "mu": options.mu}, include=options.include, verbose=False
        )
    except ValueError as error:
        raise ModelError(f"--include: {error}") from error
    step = stepper(recipe, groups, seed)
    dev = problem.dev.fixed_batches(EVAL_BATCH)
    train = problem.train.fixed_batches(EVAL_BATCH, first=LOSS_EXAMPLES)
    curve: list[dict[str, float]] = []

    def record(number: int) -> None:
        point = {"step": number, "train_loss": problem.evaluate(model, train)["loss"]}
        point |= {f"dev_{key}": value for key, value in problem.evaluate(model, dev).items()}
        curve.append(point)

    record(0)
    seconds = 0.0
    batches = shuffled_batches(len(problem.train), options.batch_size, seed)
    for number, indices in enumerate(islice(batches, options.steps), start=1):
        batch = problem.train.batch(indices)
        started = time.perf_counter()
        rate = lr * (1 - (number - 1) / options.steps) if options.schedule == "linear" else lr

        def closure(batch: Batch = batch) -> Tensor:
            return problem.loss(model, batch)

        step(closure, rate)
        seconds += time.perf_counter() - started if number > 1 else 0.0
        if number % options.eval_every == 0 or number == options.steps:
            record(number)
        advance()
    parameters = sum(p.numel() for group in groups for p in group["params"])
    return {
        "seconds_per_step": seconds / max(options.steps - 1, 1),
        "parameters": parameters,
        "curve": curve,
    }
