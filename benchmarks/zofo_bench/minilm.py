"""A text classifier of MiniLM's shapes with random weights, or a tiny one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .registry import require

LABELS = 2
LORA_TARGETS = ["query", "value"]
MINILM = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
TINY = {
    "vocab_size": 500,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def classifier(*, tiny: bool) -> nn.Module:
    """BERT with a classification head; fp32, in training mode. Nothing is downloaded.

    Raises:
        Unavailable: transformers is not installed.
    """
    transformers = require("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**(TINY if tiny else MINILM), num_labels=LABELS)
    model: nn.Module = transformers.AutoModelForSequenceClassification.from_config(config)
    return model.train()


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
