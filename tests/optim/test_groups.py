"""hybrid_param_groups on peft models: who learns how, and what is left out."""

import warnings

import pytest
import torch
from torch import nn

from zofo_optim import HybridZOFO, hybrid_param_groups

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def tiny_llama(tie: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, max_position_embeddings=32, tie_word_embeddings=tie, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def lora_bert(**options) -> nn.Module:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], **options)
    return peft.get_peft_model(tiny_bert(), config)


def split(model, **options):
    groups = hybrid_param_groups(model, verbose=False, **options)
    return {group["mode"]: dict(zip(group["param_names"], group["params"], strict=True))
            for group in groups}  # fmt: skip


def test_lora_with_modules_to_save():
    model = lora_bert()
    parts = split(model)
    assert all(("lora_" in n) or ("modules_to_save" in n) for n in parts["fo"])
    assert any("modules_to_save" in n for n in parts["fo"])
    assert all(p.requires_grad for p in parts["fo"].values())
    assert not any(p.requires_grad for p in parts["zo"].values())
    assert not any("original_module" in n or "lora_" in n for n in parts["zo"])
    base = {n for n, _ in tiny_bert().named_parameters()}
    # everything of the base but the replaced classifier
    assert len(parts["zo"]) == len(base) - 2


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_causal_adapters_and_tied_head(kind):
    configs = {
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    model = peft.get_peft_model(tiny_llama(), configs[kind])
    parts = split(model)
    ids = [id(p) for p in parts["zo"].values()]
    assert len(ids) == len(set(ids))
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight
    assert sum(p is head for p in parts["zo"].values()) == 1
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in parts["fo"].values()} == trainable


def test_tied_weight_is_kept_when_only_one_of_its_names_is_unused():
    """modules_to_save copies the tied head; the embedding still reads the original weight."""
    model = tiny_llama()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about tied weights in some versions
        model = peft.get_peft_model(model, config)
    parts = split(model)
    embedding = model.get_input_embeddings().weight
    assert sum(p is embedding for p in parts["zo"].values()) == 1


def test_inactive_adapters_are_left_out():
    model = lora_bert()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model.add_adapter("other", config)
    model.set_adapter("other")
    parts = split(model)
    assert all(".other." in n for n in parts["fo"])
    assert not any("lora_" in n or "modules_to_save" in n for n in parts["zo"])


def unused(model, **batch):
    """Zeroth-order names that do not reach the loss, and reaching ones that are left out."""
    parts = split(model)
    chosen = {id(p) for group in parts.values() for p in group.values()}
    model.eval()
    idle, missed = set(), set()
    with torch.no_grad():
        before = model(**batch).loss
        for name, p in model.named_parameters():
            kept = p.clone()
            p.add_(torch.randn_like(p))
            reaches = model(**batch).loss != before
            p.copy_(kept)
            if name in parts["zo"] and not reaches:
                idle.add(name)
            if id(p) not in chosen and reaches:
                missed.add(name)
    return idle, missed


@pytest.mark.parametrize("state", ["active", "merged", "disabled", "other"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("LNTuningConfig", {}), ("FrodConfig", {"target_modules": ["q_proj", "v_proj"]})],
)
def test_base_layers_that_an_adapter_replaces(kind, options, state):
    """They are left out as long as the forward pass goes by the adapter."""
    if not hasattr(peft, kind):
        pytest.skip(f"peft {peft.__version__} has no {kind}")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(tiny_llama(tie=False), config)
    if state == "merged":
        model.merge_adapter()
    elif state == "disabled":
        model.base_model.disable_adapter_layers()
    elif state == "other":
        model.add_adapter("other", config)
        model.set_adapter("other")
    tokens = torch.arange(50).reshape(5, 10)
    assert unused(model, input_ids=tokens, labels=tokens) == (set(), set())
    if state == "active":
        replaced = [n for n in split(model)["zo"] if n.endswith("base_layer.weight")]
        assert replaced == []


def test_saved_modules_that_are_disabled():
    model = lora_bert()
    model.base_model.disable_adapter_layers()
    parts = split(model)
    assert not any("lora_" in n or "modules_to_save" in n for n in parts["zo"])
    # frozen, hence zeroth-order, but for peft before 0.19, which makes the originals trainable
    originals = {n: p for n, p in model.named_parameters() if "original_module" in n}
    assert len(originals) == 2
    for name, p in originals.items():
        assert name in parts["fo" if p.requires_grad else "zo"]
    if not any(p.requires_grad for p in originals.values()):
        assert list(parts) == ["zo"]


def test_non_float_tensors_and_plain_models():
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3), requires_grad=False)
    model.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    parts = split(model)
    assert list(parts) == ["zo"]
    assert list(parts["zo"]) == ["weight"]
    assert list(split(nn.Linear(2, 2))) == ["fo"]


def test_exclude():
    model = lora_bert()
    everything = split(model)["zo"]
    for pattern in ("embeddings", r"Embeddings\.", "*embeddings*"):
        kept = split(model, exclude=pattern)["zo"]
        assert set(everything) - set(kept) == {n for n in everything if "embeddings" in n}
    kept = split(model, exclude=["norm", "bias$"])["zo"]
    assert not any("LayerNorm" in n or n.endswith("bias") for n in kept)
    assert any(n.endswith("weight") for n in kept)
    # the adapter is never excluded
    assert split(model, exclude=["query"])["fo"].keys() == split(model)["fo"].keys()


def test_include():
    model = lora_bert()
    everything = split(model)["zo"]
    kept = split(model, include="bias$")["zo"]
    assert set(kept) == {n for n in everything if n.endswith("bias")}
    kept = split(model, include=["bias$", "LayerNorm"], exclude="embeddings")["zo"]
    assert all("embeddings" not in n for n in kept)
    assert any(n.endswith("LayerNorm.weight") for n in kept)
    assert split(model, include="bias$")["fo"].keys() == split(model)["fo"].keys()


def test_options_names_and_summary(capsys):
    groups = hybrid_param_groups(lora_bert(), zo=dict(lr=1e-6, mu=1e-2), fo=dict(lr=1e-3))
    summary = capsys.readouterr().out
    assert summary.count("\n") == 1
    assert "zeroth-order" in summary
    assert "first-order" in summary
    assert "left out (unused): 2 tensors" in summary
    assert [g["mode"] for g in groups] == ["zo", "fo"]
    assert groups[0]["mu"] == 1e-2
    assert type(groups[0]) is dict
    optimizer = HybridZOFO(groups)
    assert optimizer.param_groups[0]["param_names"] == groups[0]["param_names"]
    assert optimizer.state_dict()["param_groups"][1]["lr"] == 1e-3


def test_hybrid_step_moves_base_and_adapter():
    model = lora_bert()
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), fo=dict(lr=0.1), verbose=False)
    optimizer = HybridZOFO(groups, fo_optimizer=torch.optim.AdamW)
    before = {n: p.clone() for n, p in model.named_parameters()}
    batch = {"input_ids": torch.randint(0, 50, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}
    for _ in range(2):  # LoRA's A only moves once B has left zero
        optimizer.zero_grad()
        loss = optimizer.step(lambda: model(**batch).loss)
    assert loss.isfinite()
    for name, p in model.named_parameters():
        moved = not torch.equal(before[name], p)
        assert moved == ("original_module" not in name), name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"exclude": "nothing_like_this"}, ValueError, "exclude must match"),
        ({"include": ["bias", "no_such"]}, ValueError, "include must match .* 'no_such'"),
        ({"zo": {"params": []}}, ValueError, "zo must not set 'params'"),
        ({"fo": {"mode": "zo"}}, ValueError, "fo must not set 'mode'"),
        ({"fo": 3}, TypeError, "fo must be a mapping"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        hybrid_param_groups(lora_bert(), **arguments)


def test_bad_models():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        hybrid_param_groups([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="at least one parameter"):
        hybrid_param_groups(nn.ReLU())


def test_zeroth_order_options_for_a_model_that_is_not_frozen():
    """They would be ignored, and the whole model trained by first order."""
    message = r"zo must be left out .* got \{'lr': 1e-06\}.*model\.requires_grad_\(False\)"
    for fo in (None, {"lr": 1e-3}):
        with pytest.raises(ValueError, match=message):
            hybrid_param_groups(nn.Linear(2, 2), zo={"lr": 1e-6}, fo=fo)
    with pytest.raises(ValueError, match=r"all that is frozen is left out: .* \(excluded\)"):
        hybrid_param_groups(lora_bert(), zo={"lr": 1e-6}, exclude=".")
    for zo in (None, {"lr": 1e-6}):
        (group,) = split(nn.Linear(2, 2).requires_grad_(False), zo=zo)
        assert group == "zo"
    assert list(split(nn.Linear(2, 2), fo={"lr": 1e-3})) == ["fo"]


class Params4bit(nn.Parameter):
    """Named as bitsandbytes names its own."""


def test_quantised_and_partitioned_base_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    model[0].weight = Params4bit(torch.zeros(5, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"bitsandbytes.*load .*bfloat16.*'0.weight' is one"):
        hybrid_param_groups(model, verbose=False)
    (group,) = hybrid_param_groups(model, exclude=r"^0\.weight", verbose=False)
    assert group["param_names"] == ["0.bias", "1.weight", "1.bias"]
    (group,) = hybrid_param_groups(model, include="bias", verbose=False)
    assert group["param_names"] == ["0.bias", "1.bias"]
    model[0].weight = nn.Parameter(torch.zeros(0), requires_grad=False)
    model[0].weight.ds_id = 0
    with pytest.raises(ValueError, match=r"ZeRO-3 .*train without DeepSpeed.*'0.weight' is one"):
        hybrid_param_groups(model, verbose=False)
