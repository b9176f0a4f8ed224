"""The classification head that every method of `finetune.py` starts from, on an encoder.

`prompts`: zero-shot, from a few sentences per class; sees no label. `probe`: a logistic regression
on the frozen model's features, the best that a frozen model offers. `random`: transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .classification import LAYOUTS, Batch
from .models import ModelError, Problem

PROBE_PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01)
PROBE_FOLDS = 5
HEADS = ("prompts", "probe", "random")
BATCH = 32


def set_head(problem: Problem, head: str) -> None:
    """Give the encoder of the problem its first head.

    Raises:
        ModelError: the task, or the model, has no such head.
    """
    model: Any = problem.base
    batches = problem.train.fixed_batches(BATCH)  # type: ignore[attr-defined]
    layout = LAYOUTS[problem.task]
    if head == "probe":
        if layout.outputs == 1:
            raise ModelError(f"task {problem.task!r} scores options: use --head random")
        fit_probe(model, batches)
    elif head == "prompts":
        if not layout.prompts:
            raise ModelError(f"task {problem.task!r} has no prompts: use --head probe or random")
        set_prompt_head(model, problem.tokenizer, layout.prompts, batches)


def last_linear(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """The layer that makes the logits: the last linear layer with one output per label."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear layer with {model.config.num_labels} outputs"
        )
    return found[-1]


@torch.no_grad()
def head_features(model: PreTrainedModel, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """What the last layer sees for each example (n, width), float32 on the CPU, and the labels.

    Decoders score every token and use the last one that is not padding: so does this.
    """
    model.eval()
    seen: list[Tensor] = []
    features: list[Tensor] = []
    labels: list[Tensor] = []
    hook = last_linear(model)[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"})
            x = seen.pop()
            if x.dim() == 3:
                mask = batch["attention_mask"]
                last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
                x = x[torch.arange(len(x), device=x.device), last]
            features.append(x.float().cpu())
            labels.append(batch["labels"].cpu())
    finally:
        hook.remove()
    return torch.cat(features), torch.cat(labels)


def logistic_regression(
    x: Tensor, y: Tensor, classes: int, penalty: float
) -> tuple[Tensor, Tensor]:
    """Weights (classes, width) and bias: least cross-entropy + penalty * |W|^2, by L-BFGS."""
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, y)
        loss = loss + penalty * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach(), bias.detach()


def fit_probe(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """Set the last layer to a logistic regression on the frozen features; returns its penalty.

    Features are standardised (and the scaling is folded into the layer). The penalty is the one of
    `PROBE_PENALTIES` with the best accuracy in a 5-fold cross-validation on the training data.
    """
    x, y = head_features(model, batches)
    layer = last_linear(model)[1]
    classes = layer.out_features
    mean = x.mean(0) if layer.bias is not None else torch.zeros(x.shape[1])
    scale = x.std(0).clamp_min(1e-6)
    z = (x - mean) / scale
    fold = torch.randperm(len(z), generator=torch.Generator().manual_seed(0)) % PROBE_FOLDS

    def cross_validated(penalty: float) -> int:
        right = 0
        for k in range(PROBE_FOLDS):
            weight, bias = logistic_regression(z[fold != k], y[fold != k], classes, penalty)
            guess = (z[fold == k] @ weight.T + bias).argmax(1)
            right += int((guess == y[fold == k]).sum())
        return right

    penalty = max(PROBE_PENALTIES, key=cross_validated)
    weight, bias = logistic_regression(z, y, classes, penalty)
    with torch.no_grad():
        layer.weight.copy_(weight / scale)
        if layer.bias is not None:
            layer.bias.copy_(bias - (weight / scale) @ mean)
    return penalty


def set_prompt_head(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[str]],
    batches: Iterable[Batch],
) -> None:
    """Set the last layer to the nearest class of prompts: logits follow the class's mean feature.

    Centred on the mean feature of the training sentences, and scaled so that the logits have a
    standard deviation of 1/2 there; their labels are not used.
    """
    layer = last_linear(model)[1]
    if len(prompts) != layer.out_features:
        raise ModelError(
            f"the task needs prompts for {layer.out_features} labels; use --head probe"
        )
    if layer.bias is None:
        raise ModelError("a head without bias cannot start from prompts: use --head probe")
    means = []
    for sentences in prompts:
        encoded = tokenizer(list(sentences), padding=True, return_tensors="pt").to(model.device)
        labels = torch.zeros(len(sentences), dtype=torch.long)
        means.append(head_features(model, [{**encoded, "labels": labels}])[0].mean(0))
    weight = torch.stack(means)
    weight = weight - weight.mean(0)
    x = head_features(model, batches)[0]
    weight = weight * (0.5 / ((x - x.mean(0)) @ weight.T).std())
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(-weight @ x.mean(0))
