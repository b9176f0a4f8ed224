"""Causal language models with random weights, made on the device from their configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .registry import require

LORA_TARGETS = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Decoder:
    """A configuration of transformers: its model type, and what differs from the defaults."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


OPT_1_3B = Decoder(
    "OPT-1.3B",
    "opt",
    {
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
    },
)
LLAMA_7B = Decoder("Llama-7B", "llama")  # the defaults are this model's
SMALL = Decoder(
    "Llama, 4 layers of 256",
    "llama",
    {
        "vocab_size": 2000,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
)
TINY = Decoder(
    "Llama, 2 layers of 32",
    "llama",
    {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(decoder: Decoder, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model without dropout, frozen; nothing is downloaded.

    Raises:
        Unavailable: transformers is not installed.
    """
    transformers = require("transformers")
    config = transformers.AutoConfig.for_model(decoder.kind, use_cache=False, **decoder.options)
    torch.manual_seed(0)
    with device, _default_dtype(dtype):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False)


def shapes(decoder: Decoder) -> list[tuple[int, ...]]:
    """Of the model's parameters; needs no memory for them."""
    model = build(decoder, torch.device("meta"), torch.float32)
    return [tuple(p.shape) for p in model.parameters()]


def random_tokens(model: nn.Module, rows: int, tokens: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    vocabulary: int = model.config.vocab_size  # type: ignore[assignment, union-attr]
    return torch.randint(0, vocabulary, (rows, tokens), generator=generator).to(device)


def loss_closure(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """Mean cross-entropy of the next token, in fp32."""
    targets = ids[:, 1:].flatten()
    mask = torch.ones_like(ids)

    def closure() -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets)

    return closure
