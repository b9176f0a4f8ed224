"""perturbation="streamed": models of transformers, adapters of peft."""

import warnings

import pytest
import torch
from streamed_models import assert_matches, tokens

from zofo_optim.perturbation import streaming

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def hugging_face(kind, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = SIZES | {"max_position_embeddings": 32} | options
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=50
        )
        return transformers.GPT2LMHeadModel(config)
    if kind == "opt":
        config = transformers.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **sizes)
        return transformers.OPTForCausalLM(config)
    sizes["intermediate_size"] = 32
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    config = transformers.LlamaConfig(pad_token_id=0, **sizes)
    return transformers.LlamaForCausalLM(config)


def language_loss(model):
    ids = tokens(2, 6, high=50)
    if (
        "Classification"
        in type(getattr(model, "base_model", model)).__name__ + type(model).__name__
    ):
        return model(input_ids=ids, labels=torch.tensor([0, 1])).loss
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss


@pytest.fixture
def caught(monkeypatch):
    """Names of the parameters that were copied."""
    names = set()
    original = streaming.Streaming._copy
    monkeypatch.setattr(
        streaming.Streaming, "_copy", lambda self, s: names.add(s.name) or original(self, s)
    )
    return names


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("llama", False),
        ("llama", True),
        ("opt", False),
        ("opt", True),
        ("bert", True),
        ("gpt2", True),
    ],
)
def test_transformers(kind, tied, attention, caught):
    model = hugging_face(kind, tie_word_embeddings=tied).requires_grad_(False)
    model.set_attn_implementation(attention)
    assert_matches(model.train(), language_loss, steps=2)
    assert caught == {name for name, _ in model.named_parameters()}


def test_gradient_checkpointing(caught):
    model = hugging_face("llama").requires_grad_(False)
    model.gradient_checkpointing_enable()
    assert_matches(model.train(), language_loss, steps=2)
    assert caught == {name for name, _ in model.named_parameters()}


def test_sixteen_bit_transformers(caught):
    model = hugging_face("llama").bfloat16().requires_grad_(False)
    assert_matches(model, language_loss, steps=2)
    assert caught == {name for name, _ in model.named_parameters()}


ADAPTERS = {
    "lora": ("LoraConfig", {"r": 2, "lora_dropout": 0.1}),
    "lora, modules_to_save": ("LoraConfig", {"r": 2, "modules_to_save": ["lm_head"]}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}),
    "loha": ("LoHaConfig", {"r": 2}),
    "lokr": ("LoKrConfig", {"r": 2}),
    "vera": ("VeraConfig", {"r": 2}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "layer norms": ("LNTuningConfig", {}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft(kind, caught):
    """Gradients for the adapter at the clean point, streaming for the base."""
    peft = pytest.importorskip("peft")
    name, options = ADAPTERS[kind]
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    if kind in ("prompt", "prefix", "p-tuning"):
        targets = {}
    elif kind == "layer norms":
        targets = {"target_modules": ["input_layernorm"]}
    elif kind == "vera":
        targets = {"target_modules": ["q_proj", "v_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, name)(task_type="CAUSAL_LM", **targets, **options)
        model = peft.get_peft_model(hugging_face("llama"), config)
        optimizer = assert_matches(model.train(), language_loss)
    unused = {"layer norms": "input_layernorm.base_layer"}.get(kind, " ")  # adapted copies serve
    names = optimizer.param_groups[0]["param_names"]
    assert caught == {name for name in names if unused not in name}
    base = hugging_face("llama").num_parameters()
    assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) > 0.8 * base
