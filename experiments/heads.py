"""The classification head that every method of `finetune.py` starts from, on an encoder.

`prompts`: zero-shot, from a few sentences per class; sees no label. `probe`: a logistic regression
on the frozen model's features, the best that a frozen model offers. `random`: transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .classification import Batch, Encoded
from .models import ModelError, Problem

PROBE_CS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
PROBE_FOLDS = 5
HEADS = ("prompts", "probe", "random")
BATCH = 32


def set_head(problem: Problem, head: str) -> None:
    """Give the encoder of the problem its first head.

    Raises:
        ModelError: the task, or the model, has no such head.
    """
    layout, task = problem.form.layout, problem.form.task
    assert layout is not None
    assert isinstance(problem.train, Encoded)
    batches = problem.train.fixed_batches(BATCH)
    if head == "probe":
        if layout.outputs == 1:
            raise ModelError(f"task {task!r} scores options: use --head random")
        fit_probe(problem.base, batches)
    elif head == "prompts":
        if not layout.prompts:
            raise ModelError(f"task {task!r} has no prompts: use --head probe or random")
        set_prompt_head(problem.base, problem.tokenizer, layout.prompts, batches)


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
    model.eval()  # type: ignore[no-untyped-call]
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


def fit_probe(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """Set the last layer to a logistic regression on the frozen features; returns its `C`.

    Features are standardised (and the scaling is folded into the layer). `C`, scikit-learn's
    inverse strength of the penalty, is the one of `PROBE_CS` with the best accuracy in a
    cross-validation on the training data, of 5 parts or as many as the rarest label has examples.

    Raises:
        ModelError: a label has no example, or less than two.
    """
    x, y = (part.numpy() for part in head_features(model, batches))
    layer = last_linear(model)[1]
    counts = np.bincount(y, minlength=layer.out_features)
    if counts.min() < 2:
        raise ModelError(
            "a probe needs two training examples of each label, got "
            f"{counts.min()} of number {counts.argmin()}: use --head random"
        )
    biased = layer.bias is not None
    probe = make_pipeline(
        StandardScaler(with_mean=biased), LogisticRegression(max_iter=1000, fit_intercept=biased)
    )
    parts = StratifiedKFold(min(PROBE_FOLDS, counts.min()), shuffle=True, random_state=0)
    search = GridSearchCV(probe, {"logisticregression__C": PROBE_CS}, cv=parts)
    fitted = search.fit(x, y).best_estimator_
    scaler, regression = fitted[0], fitted[-1]
    weight, bias = regression.coef_ / scaler.scale_, regression.intercept_
    if biased:
        bias = bias - weight @ scaler.mean_
    if len(weight) == 1:  # of two labels, scikit-learn has the difference of the logits
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        if biased:
            layer.bias.copy_(torch.from_numpy(bias))
    return float(search.best_params_["logisticregression__C"])


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
