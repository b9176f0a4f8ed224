"""A tiny Llama as transformers quantises it, with or without an adapter."""

import pytest
import torch
from quantized_models import INT4, quantised, scales

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_llama import TOKENS  # noqa: E402
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig  # noqa: E402
from torchao.quantization.granularity import PerGroup  # noqa: E402

from zofo_optim import HybridZOFO, hybrid_param_groups  # noqa: E402

NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
CONFIGS = {
    "nf4": lambda: transformers.BitsAndBytesConfig(**NF4),
    "nf4 double": lambda: transformers.BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True),
    "bnb int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2)),
    "intx int4": lambda: transformers.TorchAoConfig(
        IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(32))
    ),
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)
ALONE = "int4 cpu"
"""Neither gradients through it nor a file of transformers' own."""


def saved_llama(folder):
    """A Llama of one layer, wide enough for blocks of 64."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loaded(base, kind, dtype=torch.float32):
    if kind == ALONE:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        return quantised(model, kind).train()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=CONFIGS[kind](), dtype=dtype, device_map="cpu"
    )
    return model.requires_grad_(False).train()


def with_lora(model):
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2))


def optimizer_of(model, **options):
    groups = hybrid_param_groups(
        model,
        zo=dict(lr=0.1, mu=1e-2),
        fo=dict(lr=0.1) if any(p.requires_grad for p in model.parameters()) else None,
        quantized="scales",
        verbose=False,
    )
    return HybridZOFO(groups, **{"seed": 3, **options})


def trained(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step(lambda: model(input_ids=TOKENS, labels=TOKENS).loss)
    return model


def check_equal(model, other):
    """The scales, to the bit, and what the models compute."""
    ours, theirs = scales(model), scales(other)
    assert len(ours) == len(theirs) >= 7
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        logits = [m.train()(input_ids=TOKENS).logits for m in (model, other)]
    assert torch.equal(*logits)
