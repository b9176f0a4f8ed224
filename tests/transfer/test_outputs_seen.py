"""Outputs that are more than the inputs are seen after a feed-forward's activation, or nowhere."""

import copy

import families
import pytest
import torch
from families import logits, transformers
from torch import nn

from zofo_optim.transfer import transfer_adapter
from zofo_optim.transfer.layers import stack_of
from zofo_optim.transfer.outputs import seen_at

TEXTS = families.texts()


def wide_heads():
    """Attention of 4 heads of 8 units on a hidden size of 16, as Qwen3's and Gemma's is wider."""
    config = transformers.LlamaConfig(
        vocab_size=families.VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    return families.made(transformers.LlamaForCausalLM, config, 0)


def opt():
    config = transformers.OPTConfig(
        vocab_size=families.VOCABULARY,
        hidden_size=16,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    return families.made(transformers.OPTForCausalLM, config, 0)


def neox():
    config = transformers.GPTNeoXConfig(
        vocab_size=families.VOCABULARY,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return families.made(transformers.GPTNeoXForCausalLM, config, 0)


LLAMA, BERT, NEOX = "model.layers.1", "bert.encoder.layer.1", "gpt_neox.layers.1"


@pytest.mark.parametrize(
    ("make", "name", "place"),
    [
        (wide_heads, f"{LLAMA}.self_attn.o_proj", (f"{LLAMA}.self_attn.o_proj", "output")),
        (wide_heads, f"{LLAMA}.self_attn.k_proj", (f"{LLAMA}.self_attn.k_proj", "output")),
        (wide_heads, f"{LLAMA}.self_attn.q_proj", None),
        (wide_heads, f"{LLAMA}.mlp.gate_proj", (f"{LLAMA}.mlp.act_fn", "output")),
        (wide_heads, f"{LLAMA}.mlp.up_proj", (f"{LLAMA}.mlp.down_proj", "input")),
        (wide_heads, f"{LLAMA}.mlp.down_proj", (f"{LLAMA}.mlp.down_proj", "output")),
        (wide_heads, "lm_head", None),
        (wide_heads, "model.embed_tokens", ("model.embed_tokens", "output")),
        (opt, "model.decoder.layers.1.fc1", ("model.decoder.layers.1.fc2", "input")),
        (
            lambda: families.bert(intermediate=64),
            f"{BERT}.intermediate.dense",
            (f"{BERT}.output.dense", "input"),
        ),
        (neox, f"{NEOX}.mlp.dense_h_to_4h", (f"{NEOX}.mlp.dense_4h_to_h", "input")),
        # as wide as the units of the feed-forward beside it
        (neox, f"{NEOX}.attention.query_key_value", None),
    ],
)
def test_places(make, name, place):
    model = make()
    stack = stack_of(model)
    assert seen_at(model, stack, name) == place
    tuned = families.peft.get_peft_model(
        model, families.peft.LoraConfig(target_modules="all-linear", r=2)
    )
    assert seen_at(tuned.get_base_model(), stack, name) == place


class Gated(nn.Module):
    """A gated feed-forward whose layers' names do not say which of them is the gate."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


@pytest.mark.parametrize(
    ("parts", "place"),
    [
        ({"gate_proj": nn.Linear(4, 8), "w3": nn.Linear(4, 8), "act": nn.SiLU()}, "act"),
        ({"w1": nn.Linear(4, 8), "w3": nn.Linear(4, 8), "act": nn.SiLU()}, None),
        ({"gate_proj": nn.Linear(4, 8), "w3": nn.Linear(4, 8)}, None),
        ({"gate_proj": nn.Linear(4, 8), "w3": nn.Linear(4, 4), "act": nn.SiLU()}, None),
        (
            {
                "gate_proj": nn.Linear(4, 8),
                "w3": nn.Linear(4, 8),
                "act": nn.SiLU(),
                "also": nn.Linear(8, 2),
            },
            None,
        ),
        ({"w1": nn.Linear(4, 8), "act": nn.SiLU(), "dropout": nn.Dropout()}, "w2"),
    ],
)
def test_feed_forwards_by_their_parts(parts, place):
    """What is not understood is not seen."""
    model = nn.Module()
    model.layers = nn.ModuleList([Gated(**parts, w2=nn.Linear(8, 4))])
    model.config = transformers.PretrainedConfig(num_hidden_layers=1)
    found = seen_at(model, stack_of(model), f"layers.0.{next(iter(parts))}")
    assert (found and found.module.rpartition(".")[2]) == place


def test_queries_that_widen_are_refused():
    """Negated queries and keys leave attention as it is, so what comes out cannot tell them."""
    plain = wide_heads()
    large = copy.deepcopy(plain)
    with torch.no_grad():
        for layer in large.model.layers:
            layer.self_attn.q_proj.weight.neg_()
            layer.self_attn.k_proj.weight.neg_()
    torch.testing.assert_close(logits(large, TEXTS[0]), logits(plain, TEXTS[0]))
    small = families.with_lora(plain, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.* 32 outputs, more than"):
        transfer_adapter(small, large, TEXTS)
