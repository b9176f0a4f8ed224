"""Tiny models of several kinds with a batch each, for partitions."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def ids(*shape):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(0))


SMALL = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)


def of_text(cls, config, **labels):
    batch = dict(input_ids=ids(3, 8), attention_mask=torch.ones(3, 8, dtype=torch.long), **labels)
    return cls(config), batch


def llama():
    config = transformers.LlamaConfig(**SMALL, intermediate_size=32, pad_token_id=0)
    return of_text(transformers.LlamaForCausalLM, config, labels=ids(3, 8))


def opt():
    config = transformers.OPTConfig(
        **SMALL, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16, pad_token_id=0
    )
    return of_text(transformers.OPTForCausalLM, config, labels=ids(3, 8))


def gpt2():
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return of_text(transformers.GPT2LMHeadModel, config, labels=ids(3, 8))


def bert():
    config = transformers.BertConfig(**SMALL, intermediate_size=32, max_position_embeddings=32)
    return of_text(
        transformers.BertForSequenceClassification, config, labels=torch.tensor([0, 1, 1])
    )


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0
    )
    config.decoder_start_token_id = 0
    return of_text(transformers.T5ForConditionalGeneration, config, labels=ids(3, 5))


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = transformers.ViTForImageClassification(config)
    return model, dict(pixel_values=pixels, labels=torch.tensor([0, 1, 1]))


def lora_llama():
    model, batch = llama()
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2)), batch


KINDS = {f.__name__: f for f in (llama, opt, gpt2, bert, t5, vit, lora_llama)}


def made(kind):
    """The model, of seed 0, without dropout, and a closure."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = KINDS[kind]()
    model.eval()
    return model, lambda: model(**batch).loss


def mlp(depth=4, width=6):
    """Linear layers, and a closure; adapters none."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
        model = nn.Sequential(*layers)
        x = torch.randn(5, width)
    return model, lambda: model(x).square().mean()
