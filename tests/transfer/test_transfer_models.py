"""Models and heads that cannot be carried are refused; what was carried is all there."""

import copy

import families
import peft
import pytest
import torch
from families import logits, transformers
from torch import nn

from zofo_optim.transfer import add_bottlenecks, checks, transfer_adapter, zo_param_groups

TEXTS = families.texts()
UNSEEN = families.texts(1, seed=9)[0]


def queries(model=None, **options):
    return families.with_lora(model or families.llama(), target_modules=["q_proj"], **options)


def distilbert():
    """Its classifier reads what its pre-classifier writes; peft saves both."""
    config = transformers.DistilBertConfig(
        vocab_size=families.VOCABULARY,
        dim=16,
        hidden_dim=16,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return families.made(transformers.DistilBertForSequenceClassification, config, 0)


@pytest.mark.parametrize("which", ["small", "large"])
def test_a_model_that_is_not_in_memory(which):
    """Offloaded weights are on the meta device between passes, where new ones would be lost."""
    small, large = queries(), families.llama()
    model = {"small": small, "large": large}[which]
    layer = model.get_submodule(f"{'base_model.model.' * (which == 'small')}model.layers.1.mlp")
    layer.up_proj.to("meta")
    with pytest.raises(ValueError, match=rf"{which} must be in memory .*layers\.1\.mlp\.up_proj"):
        transfer_adapter(small, large, TEXTS)
    assert not any(hasattr(module, "lora_A") for module in large.modules())


def test_a_large_model_that_accelerate_offloads():
    accelerate = pytest.importorskip("accelerate")
    large = accelerate.cpu_offload(families.llama(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"embed_tokens.* meta device"):
        transfer_adapter(queries(), large, TEXTS)


def test_what_did_not_arrive_is_an_error(monkeypatch):
    """And the large model is as it was."""
    large = families.llama()
    names = list(dict(large.named_modules()))
    with monkeypatch.context() as patch:
        patch.setattr(peft, "set_peft_model_state_dict", lambda *args, **kwargs: None)
        with pytest.raises(RuntimeError, match=r"did not arrive: .*lora_A.* has other values"):
            transfer_adapter(queries(), large, TEXTS)
    assert list(dict(large.named_modules())) == names
    model, _ = transfer_adapter(queries(), large, TEXTS)
    state = peft.get_peft_model_state_dict(model)
    checks.check_arrived(model, state, "default")
    first = next(iter(state))
    with pytest.raises(RuntimeError, match="what was carried lacks"):
        checks.check_arrived(model, {n: t for n, t in state.items() if n != first}, "default")
    with pytest.raises(RuntimeError, match="the large model lacks 'other'"):
        checks.check_arrived(model, {**state, "other": torch.ones(1)}, "default")


def test_a_merged_small_model():
    """To take a merged adapter off would change its weights."""
    small = queries()
    small.merge_adapter()
    weight = small.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = weight.clone()
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\) first"):
        transfer_adapter(small, families.llama(), TEXTS)
    assert torch.equal(weight, before)
    small.unmerge_adapter()
    transfer_adapter(small, families.llama(), TEXTS)


def test_adapters_that_peft_holds_in_another_way():
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    inside = families.llama()
    inside.add_adapter(config)
    for small in (inside, peft.PeftMixedModel(families.llama(), config)):
        with pytest.raises(ValueError, match=rf"peft\.PeftModel, .*{type(small).__name__}"):
            transfer_adapter(small, families.llama(), TEXTS)


def test_compiled_models():
    small, large = queries(), families.llama()
    with pytest.raises(ValueError, match=r"large must not be wrapped by torch\.compile"):
        transfer_adapter(small, torch.compile(large, backend="eager"), TEXTS)
    large.model.layers[1] = torch.compile(large.model.layers[1], backend="eager")
    with pytest.raises(ValueError, match=r"'model\.layers\.1\._orig_mod'"):
        transfer_adapter(small, large, TEXTS)


@pytest.mark.parametrize("training", [True, False])
def test_new_modules_are_in_the_large_models_mode(training):
    """Else LoRA's dropout would be on in a model in evaluation mode."""
    large = families.llama(labels=3).train(training)
    small = queries(families.llama(labels=3), task="SEQ_CLS", lora_dropout=0.5)
    model, _ = transfer_adapter(small, large, TEXTS)
    assert {module.training for module in model.modules()} == {training}
    assert torch.equal(logits(model, UNSEEN), logits(model, UNSEEN)) is not training


def test_the_revision_is_the_small_models_alone():
    model, _ = transfer_adapter(queries(revision="abc"), families.llama(), TEXTS)
    assert model.peft_config["default"].revision is None


@pytest.mark.parametrize("kind", ["lora", "bottlenecks"])
def test_trained_modules_in_layers_are_refused(kind):
    """Peft and bottlenecks would save them by names that are of other layers in the large model."""
    saved = ["layers.1.mlp.down_proj"]
    if kind == "lora":
        small = queries(modules_to_save=saved)
    else:
        small = add_bottlenecks(families.llama(), ["o_proj"], 4, modules_to_save=saved)
    large, true = families.deeper(families.llama(), at=(1,))
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.1\.mlp\.down_proj'.* outside"):
        transfer_adapter(small, large, TEXTS, layers=true)


def test_heads_of_which_one_reads_the_other():
    """DistilBERT's: the second reads units of the first, not the model's features."""
    plain = distilbert()
    large = copy.deepcopy(plain)
    with torch.no_grad():
        large.pre_classifier.weight.normal_(0, 0.3)
        large.classifier.weight.normal_(0, 0.3)
    small = families.with_lora(plain, task="SEQ_CLS", target_modules=["v_lin"])
    model, report = transfer_adapter(small, large, families.texts(40), width="same")
    assert [row.small for row in report.rows][-1] == "pre_classifier, classifier"
    torch.testing.assert_close(logits(model, UNSEEN), logits(small, UNSEEN))


def test_several_heads_are_refused():
    plain = families.bert()
    small = families.with_lora(
        plain, task="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler", "classifier"]
    )
    with pytest.raises(ValueError, match=r"'classifier' cannot be mapped beside 'bert\.pooler'"):
        transfer_adapter(small, families.bert(), TEXTS)


def test_a_head_with_a_bias_is_read_with_an_offset():
    """The large model's features are the small one's, moved: no map through 0 undoes that."""
    plain = families.bert()
    large = copy.deepcopy(plain)
    move = torch.linspace(-3, 3, 16)
    large.bert.pooler.register_forward_hook(lambda module, args, output: output + move)
    small = families.with_lora(plain, task="SEQ_CLS", target_modules=["query"])
    families.within_outputs(small, TEXTS)
    model, report = transfer_adapter(small, large, families.texts(40), width="least_squares")
    (head,) = (row for row in report.rows if row.kind == "head")
    assert head.input_error < 1e-3
    torch.testing.assert_close(logits(model, UNSEEN), logits(small, UNSEEN), atol=1e-2, rtol=1e-2)


def test_prompts_have_no_map_of_layers():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    small = peft.get_peft_model(families.llama(), config)
    for layers in ("similar", "spread", {0: 0}):
        with pytest.raises(ValueError, match="layers must be None for prompts"):
            transfer_adapter(small, families.llama(), TEXTS, layers=layers)


def test_groups_of_a_model_with_bottlenecks():
    """Its adapters and the head that was trained with them are the adapter's group."""
    small = add_bottlenecks(families.llama(labels=3), ["o_proj"], 4, modules_to_save=["score"])
    model, _ = transfer_adapter(small, families.llama(labels=3), TEXTS)
    base, adapter = zo_param_groups(model, base=dict(lr=1e-6), adapter=dict(lr=1e-3))
    names = set(adapter["param_names"])
    assert "score.weight" in names
    assert len(names) == 2 * 4 + 1
    assert {name for name in names if "bottleneck" not in name} == {"score.weight"}
    assert names | set(base["param_names"]) == {name for name, _ in model.named_parameters()}
    assert {base["mode"], adapter["mode"]} == {"zo"}


def test_groups_of_a_model_without_an_adapter():
    """transformers' models have a method of the name of peft's active adapters."""
    model = families.llama().requires_grad_(False)
    model.more = nn.ModuleDict({"default": nn.Linear(2, 2)}).requires_grad_(False)
    with pytest.raises(ValueError, match="must have an adapter, got a LlamaForCausalLM without"):
        zo_param_groups(model, adapter=dict(lr=1e-3))


def test_token_ids_that_one_model_lacks_are_named():
    small = families.with_lora(families.llama())
    large = families.resized(families.llama(), vocab_size=families.VOCABULARY + 8)
    batches = families.texts()
    batches[0]["input_ids"][0, 0] = families.VOCABULARY
    with pytest.raises(ValueError, match=rf"got {families.VOCABULARY} where small has"):
        transfer_adapter(small, large, batches)


def test_an_adapter_that_changes_nothing_has_no_error_of_its_change():
    small = families.with_lora(families.llama(), init_lora_weights=True)
    for name, parameter in small.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    _, report = transfer_adapter(small, families.llama(seed=1), families.texts())
    assert {row.change_error for row in report.rows} == {None}
    assert report.rows[0].input_error > 0


@pytest.mark.parametrize("rslora", [False, True])
def test_a_scale_is_kept_in_files(tmp_path, rslora):
    small = families.with_lora(families.llama(), use_rslora=rslora)
    model, _ = transfer_adapter(small, families.llama(), width="same", scale=2.5)
    for module in small.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 2.5
    torch.testing.assert_close(logits(model, UNSEEN), logits(small, UNSEEN))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(families.llama(), tmp_path)
    assert torch.equal(logits(again, UNSEEN), logits(model, UNSEEN))


def test_a_scale_of_bottlenecks():
    small = families.randomised(add_bottlenecks(families.llama(), ["down_proj"], 3, scale=2.0))
    model, _ = transfer_adapter(small, families.llama(), width="same", scale=1.5)
    assert model.bottlenecks["scale"] == 3.0
    assert not torch.allclose(logits(model, UNSEEN), logits(small, UNSEEN))


@pytest.mark.parametrize("scale", [float("nan"), "2", True])
def test_a_scale_is_a_number(scale):
    with pytest.raises(ValueError, match="scale must be a finite number"):
        transfer_adapter(queries(), families.llama(), TEXTS, scale=scale)


def test_points_have_no_scale():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    small = peft.get_peft_model(families.llama(), config)
    with pytest.raises(ValueError, match="scale must be 1 for prompts and prefixes"):
        transfer_adapter(small, families.llama(), TEXTS, scale=2)
