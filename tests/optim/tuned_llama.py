"""A Llama with adapters that train above its base: to be saved, and loaded again."""

import pytest
import torch
from conftest import same_bits

from zofo_optim import HybridZOFO, hybrid_param_groups

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.randint(1, 30, (4, 3, 8), generator=torch.Generator().manual_seed(0))


def base_model(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


CONFIGS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2),
    "pissa": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights="pissa"),
    "head": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
}


def wrapped(kind="lora", **options):
    torch.manual_seed(1)
    return peft.get_peft_model(base_model(), CONFIGS[kind](), **options)


def optimizer_of(model, **options):
    zo, fo = dict(lr=1e-3, mu=1e-2), dict(lr=1e-1, momentum=0.9)
    groups = hybrid_param_groups(model, zo=zo, fo=fo, verbose=False)
    return HybridZOFO(groups, **{"distribution": "rademacher", **options})


def train(model, optimizer, first, last):
    for step in range(first, last):
        ids = IDS[step % len(IDS)]
        optimizer.zero_grad()
        optimizer.step(lambda ids=ids: model(input_ids=ids, labels=ids).loss)
    optimizer.zero_grad()


def contents(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(model, wanted):
    found = contents(model)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS[0]).logits
