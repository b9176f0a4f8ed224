"""A model without data costs what the same model with data does."""

import time

import pytest
import torch
from costed_models import choices, made

from zofo_optim.costs import costs_of

transformers = pytest.importorskip("transformers")
NAMES = ["convolutions", "llama", "opt", "gpt2", "bert", "t5", "vit", "lora"]


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_equal(name):
    if name == "lora":
        pytest.importorskip("peft")
    if name in ("opt", "bert"):
        pytest.importorskip("transformers", "5", reason="transformers 4 reads the mask's values")
    here = costs_of(*made(name))
    there = costs_of(*made(name, "meta"))
    names = [t.name for t in here.tensors]
    assert names == [t.name for t in there.tensors]
    assert here.forward_flops == there.forward_flops
    for chosen in choices(names, 4):
        assert here.flops(chosen) == there.flops(chosen)
        # a few small tensors more: masks, and tables that convolutions need
        assert there.bytes(chosen) == pytest.approx(here.bytes(chosen), rel=0.13)
        assert there.peak(chosen) == pytest.approx(here.peak(chosen), rel=0.13)


def test_a_large_model_takes_seconds():
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=2,
        num_attention_heads=32,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    ids = torch.zeros(4, 512, dtype=torch.long, device="meta")
    began = time.monotonic()
    costs = costs_of(model, lambda: model(input_ids=ids, labels=ids).loss)
    assert time.monotonic() - began < 20
    names = [t.name for t in costs.tensors]
    tokens, layer = 4 * 512, 4 * 4096**2 + 3 * 4096 * 11_008
    weights, attention = 2 * layer + 32_000 * 4096, 2 * 2 * 4 * 512 * 512 * 4096
    angles = 2 * 64 * 512  # of rotary positions: a product in transformers 4
    assert costs.forward_flops - (2 * tokens * weights + 2 * attention) in (0, angles)
    # a weight's gradient each, the error through all but the lowest layer's q, k and v, which
    # the embedding is below; fused attention computes its scores again
    backward = 2 * 2 * tokens * weights + 2 * attention * 5 // 2
    assert costs.flops(names) == backward
    assert costs.weights_bytes >= 2 * sum(p.numel() for p in model.parameters())


def test_values_are_not_there_to_be_read():
    x = torch.zeros(3, 3, device="meta")
    model = torch.nn.Linear(3, 3, device="meta")

    def closure():
        loss = model(x).sum()
        return loss if loss > 0 else -loss

    with pytest.raises(ValueError, match="must not read values of tensors on the meta device"):
        costs_of(model, closure)
