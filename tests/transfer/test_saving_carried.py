"""Models whose base and adapter both learn by forward passes come back from files as they were."""

import json

import families
import peft
import pytest
import torch
from families import logits
from safetensors.torch import load_file, save_file

from zofo_optim import (
    HybridZOFO,
    Journal,
    hybrid_param_groups,
    load_base_weights,
    load_hybrid,
    save_base_weights,
    save_hybrid,
)
from zofo_optim.names import without_layers
from zofo_optim.transfer import (
    add_bottlenecks,
    load_bottlenecks,
    save_bottlenecks,
    zo_param_groups,
)

BATCH = families.texts(1)[0]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["q_proj"], use_dora=True
    ),
    "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}
KINDS = [*CONFIGS, "bottlenecks"]


def base():
    return families.llama(labels=3)


def frozen(kind):
    """With an adapter and a head of its own."""
    if kind == "bottlenecks":
        model = add_bottlenecks(base(), ["o_proj"], 3, modules_to_save=["score"])
    else:
        model = peft.get_peft_model(base(), CONFIGS[kind]())
    return families.randomised(model).eval().requires_grad_(False)


def optimizer_of(model):
    if hasattr(model, "peft_config"):
        return HybridZOFO(zo_param_groups(model, dict(lr=1e-4), dict(lr=1e-3)))
    return HybridZOFO([dict(params=list(model.named_parameters()), mode="zo", lr=1e-4)])


def trained(model, optimizer):
    for _ in range(2):
        optimizer.step(lambda: logits(model, BATCH).square().mean())
    return logits(model, BATCH)


@pytest.mark.parametrize("kind", KINDS)
def test_hybrids_go_on_where_they_were(kind, tmp_path):
    model = frozen(kind)
    optimizer = optimizer_of(model)
    before = logits(model, BATCH)
    after = trained(model, optimizer)
    assert not torch.equal(after, before)
    save_hybrid(model, optimizer, tmp_path)
    again, state = load_hybrid(tmp_path, base())
    assert torch.equal(logits(again.eval(), BATCH), after)
    assert not any(p.requires_grad for p in again.parameters())
    other = optimizer_of(again)
    other.load_state_dict(state)
    assert torch.equal(trained(again, other), trained(model, optimizer))


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_saved_beside_the_adapter(kind, tmp_path):
    model = frozen(kind)
    optimizer = optimizer_of(model)
    after = trained(model, optimizer)
    tensors = load_file(save_base_weights(optimizer, model, tmp_path))
    assert set(tensors) == {n for n, _ in base().named_parameters()} - {"score.weight"}
    plain = base()
    load_base_weights(plain, tmp_path)
    if kind == "bottlenecks":
        save_bottlenecks(model, tmp_path)
        again = load_bottlenecks(plain, tmp_path)
    else:
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(logits(again.eval(), BATCH), after)


def test_files_of_versions_that_wrote_the_adapter_too(tmp_path):
    model = frozen("lora")
    optimizer = optimizer_of(model)
    after = trained(model, optimizer)
    save_hybrid(model, optimizer, tmp_path)
    summary = json.loads((tmp_path / "hybrid.json").read_text())
    del summary["bottlenecks"]
    (tmp_path / "hybrid.json").write_text(json.dumps(summary))
    named = model.get_base_model().named_parameters()
    weights = {without_layers(name): p.detach().clone() for name, p in named}
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in weights
    save_file(weights, tmp_path / "zo_weights.safetensors")
    again, _ = load_hybrid(tmp_path, base())
    assert torch.equal(logits(again.eval(), BATCH), after)


@pytest.mark.parametrize("trainable", [True, False])
def test_bottlenecks_that_learn_by_gradients(trainable, tmp_path):
    model = add_bottlenecks(base(), ["o_proj"], 3, modules_to_save=["score"])
    optimizer = HybridZOFO(hybrid_param_groups(model, dict(lr=1e-4), dict(lr=0.1), verbose=False))
    optimizer.step(lambda: model(**BATCH).logits.square().mean())
    save_hybrid(model, optimizer, tmp_path)
    assert not (tmp_path / "fo_weights.safetensors").exists()
    again, _ = load_hybrid(tmp_path, base(), trainable=trainable)
    assert torch.equal(logits(again, BATCH), logits(model, BATCH))
    flags = [p.requires_grad and trainable for p in model.parameters()]
    assert [p.requires_grad for p in again.parameters()] == flags
    (tmp_path / "bottlenecks.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"bottlenecks\.safetensors missing"):
        load_hybrid(tmp_path, base())


def test_bottlenecks_within_peft_are_of_its_base(tmp_path):
    model = add_bottlenecks(base(), ["o_proj"], 3)
    model = families.randomised(peft.get_peft_model(model, CONFIGS["lora"]())).eval()
    model.requires_grad_(False)
    optimizer = optimizer_of(model)
    after = trained(model, optimizer)
    save_hybrid(model, optimizer, tmp_path)
    again, _ = load_hybrid(tmp_path, add_bottlenecks(base(), ["o_proj"], 3))
    assert torch.equal(logits(again.eval(), BATCH), after)


@pytest.mark.parametrize("kind", ["lora", "bottlenecks"])
def test_a_journal_that_moves_the_adapter_is_no_substitute_for_weights(kind, tmp_path):
    model = frozen(kind)
    optimizer = optimizer_of(model)
    with Journal(tmp_path / "journal").attach(optimizer) as journal:
        after = trained(model, optimizer)
        save_hybrid(model, optimizer, tmp_path / "folder", journal=journal)
    again, _ = load_hybrid(tmp_path / "folder", base())
    assert torch.equal(logits(again.eval(), BATCH), after)
