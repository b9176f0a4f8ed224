"""Tiny models of four families, and text for them."""

import pytest
import torch

T = pytest.importorskip("transformers")

SIZES = dict(vocab_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=4)
LLAMA = dict(SIZES, intermediate_size=24, num_key_value_heads=2, pad_token_id=0)
GPT2 = dict(vocab_size=64, n_embd=16, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2)


def llama(**options):
    return made(T.LlamaForCausalLM, T.LlamaConfig(**{**LLAMA, **options}))


def qwen3():
    return made(T.Qwen3ForCausalLM, T.Qwen3Config(**LLAMA, head_dim=8))


def bert():
    config = T.BertConfig(**SIZES, intermediate_size=24, num_labels=3)
    return made(T.BertForSequenceClassification, config)


def opt():
    return made(T.OPTForCausalLM, T.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=8))


def gpt2(**options):
    return made(T.GPT2LMHeadModel, T.GPT2Config(**GPT2, **options))


FAMILIES = [llama, qwen3, bert, opt, gpt2]


def made(model_class, config):
    """With biases and norms that differ from unit to unit, as those of a trained model."""
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def text():
    """Three batches of two texts with padding on either side, and labels nobody should read."""
    ids = torch.randint(3, 64, (6, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[4, :3] = 0
    return [
        dict(input_ids=ids[k : k + 2], attention_mask=mask[k : k + 2], labels="not for models")
        for k in range(0, 6, 2)
    ]


def logits(model, batch=None):
    inputs = {key: value for key, value in (batch or text()[1]).items() if key != "labels"}
    with torch.no_grad():
        return model(**inputs).logits


def layers_of(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1)


# per family: the linear layers into the feed-forward's inner units, and the one out of them
INNER = {
    llama: (["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
    qwen3: (["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
    bert: (["intermediate.dense"], "output.dense"),
    opt: (["fc1"], "fc2"),
    gpt2: (["mlp.c_fc"], "mlp.c_proj"),
}


def outgoing(family, layer):
    """The weight out of the inner units, (outputs, inputs)."""
    weight = layer.get_submodule(INNER[family][1]).weight
    return weight.T if family is gpt2 else weight
