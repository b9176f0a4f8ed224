"""Public shapes of Llama, and what methods take there."""

from __future__ import annotations

from typing import Any

import transformers

from zofo_optim.memory import estimate_memory
from zofo_optim.memory.fitting import methods

BATCH = 8, 512
OFFLOADED = {"bf16, offloaded": "cpu", "bf16, visiting a GPU": "cuda"}
"""What computes with offloaded weights."""
WEIGHTS = ("bf16", "int8", "int4", *OFFLOADED)
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": dict(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "Llama-2-7B": dict(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32,
    ),
    "Llama-2-13B": dict(
        vocab_size=32_000, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=40,
    ),
    "Llama-2-70B": dict(
        vocab_size=32_000, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    ),
}  # fmt: skip


def config(name: str) -> Any:
    """Of transformers; without a cache of keys and values, which training has no use for."""
    return transformers.LlamaConfig(
        **SHAPES[name], use_cache=False, architectures=["LlamaForCausalLM"]
    )


def peaks(name: str, weights: str) -> dict[str, int]:
    """By method, in bytes: on a GPU, but where the CPU computes with offloaded weights.

    Args:
        name: one of ``SHAPES``.
        weights: one of ``WEIGHTS``.
    """
    device = OFFLOADED.get(weights, "cuda")
    stored = "bf16" if weights in OFFLOADED else weights
    found = {
        method: estimate_memory(config(name), kind, BATCH, weights=stored, device=device, **options)
        for method, (kind, options) in methods(stored).items()
        if bool(options.get("offloaded")) == (weights in OFFLOADED)
    }
    return {method: estimate.most for method, estimate in found.items()}
