"""Bridge models: what is kept computes what it did, and the large model stays as it was."""

import copy
import json

import pytest
import torch
from bridged import (
    FAMILIES,
    GPT2,
    T,
    bert,
    gpt2,
    layers_of,
    llama,
    logits,
    opt,
    outgoing,
    qwen3,
    text,
)

from zofo_optim.transfer.bridge import bridge_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bridge_that_keeps_everything_is_the_model_to_the_bit(family):
    large = family()
    for options in (dict(layers=4, units=1.0), dict(layers=[0, 1, 2, 3])):
        assert torch.equal(logits(bridge_model(large, text(), **options)), logits(large))


@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_do_nothing_are_left_out_and_the_output_stays(family):
    large = family()
    dead = {}
    with torch.no_grad():
        for k, layer in enumerate(layers_of(large)):
            weight = outgoing(family, layer)
            if family is opt:  # whose other units may be off on all tokens
                layer.fc1.bias += 2
            dead[k] = torch.randperm(weight.shape[1])[: weight.shape[1] // 2]
            weight[:, dead[k]] = 0
    bridge = bridge_model(large, text(), layers=4, units=0.5)
    width = outgoing(family, layers_of(large)[0]).shape[1]
    for k, layer in enumerate(layers_of(bridge)):
        assert outgoing(family, layer).shape[1] == width // 2
        kept = bridge.config.bridge["units"][str(k)]
        assert sorted({*range(width)} - {*dead[k].tolist()}) == kept
    torch.testing.assert_close(logits(bridge), logits(large), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [llama, qwen3])
@pytest.mark.parametrize("dead", [0, 1])
def test_heads_that_add_nothing_are_left_out_and_the_output_stays(family, dead):
    large = family()
    size = 2 * large.config.head_dim  # two heads of queries to one of keys
    with torch.no_grad():
        for layer in layers_of(large):
            layer.self_attn.o_proj.weight[:, dead * size : (dead + 1) * size] = 0
    bridge = bridge_model(large, text(), layers=4, heads=1)
    assert bridge.config.bridge["heads"] == {str(k): [1 - dead] for k in range(4)}
    assert layers_of(bridge)[0].self_attn.k_proj.weight.shape[0] == large.config.head_dim
    torch.testing.assert_close(logits(bridge), logits(large), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("identities", [(0, 2), (1, 3)])
@pytest.mark.parametrize("family", [llama, opt, gpt2])
def test_layers_that_do_nothing_are_left_out_first(family, identities):
    large = family()
    into = {llama: ("self_attn.o_proj", "mlp.down_proj"), opt: ("self_attn.out_proj", "fc2")}
    with torch.no_grad():
        for k in identities:
            for name in into.get(family, ("attn.c_proj", "mlp.c_proj")):
                for parameter in layers_of(large)[k].get_submodule(name).parameters():
                    parameter.zero_()
    bridge = bridge_model(large, text(), layers=2)
    assert bridge.config.bridge["layers"] == sorted({*range(4)} - {*identities})
    torch.testing.assert_close(logits(bridge), logits(large), rtol=1e-5, atol=1e-5)


def test_refitted_weights_are_closer_to_what_was_there():
    large = opt()

    def output(model, k, inputs):
        with torch.no_grad():
            return layers_of(model)[k].fc2(layers_of(model)[k].fc1(inputs).relu())

    seen = []
    layer = layers_of(large)[2]
    handle = layer.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in text():
        logits(large, batch)
    handle.remove()
    rows = torch.cat([row.reshape(-1, 16) for row in seen])
    rows = rows[torch.cat([batch["attention_mask"].flatten() for batch in text()]).bool()]
    missed = []
    for refit in (False, True):
        bridge = bridge_model(large, text(), layers=4, units=6, refit=refit)
        missed.append(output(bridge, 2, rows) - output(large, 2, rows))
    assert missed[1].norm() < 0.7 * missed[0].norm()
    mean = missed[1].mean(0)  # an offset is not penalised
    torch.testing.assert_close(mean, torch.zeros(16), rtol=0, atol=1e-5)


def state_of(model):
    return dict(
        tensors={name: tensor.clone() for name, tensor in model.state_dict().items()},
        flags=[p.requires_grad for p in model.parameters()],
        modes=[m.training for m in model.modules()],
        hooks=[(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        config=model.config.to_json_string(),
    )


@pytest.mark.parametrize("labels", ["", "not for models"])
def test_the_large_model_is_left_as_it_was_and_has_no_graph(labels):
    large = llama(tie_word_embeddings=True).train()
    large.model.layers[1].eval()
    large.model.embed_tokens.requires_grad_(False)
    before, drawn, saved = state_of(large), torch.get_rng_state(), []
    batches = [batch | dict(labels=labels) for batch in text()]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda _: None)
    with hooks:
        bridge_model(large, iter(batches), layers=2, units=0.5, heads=1)
    after = state_of(large)
    assert not saved
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, tensor in before.pop("tensors").items():
        assert torch.equal(after["tensors"][name], tensor)
    assert {key: after[key] for key in before} == before


def test_hooks_and_modes_go_too_where_the_model_fails():
    large = llama().train()
    before = state_of(large)
    wrong = [*text(), dict(input_ids=torch.tensor([[1000]]))]
    with pytest.raises(IndexError):
        bridge_model(large, wrong, layers=2)
    after = state_of(large)
    assert [after[key] for key in ("modes", "hooks")] == [before["modes"], before["hooks"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bridge_is_a_model_of_its_own(dtype):
    large = llama(tie_word_embeddings=True).to(dtype)
    with torch.inference_mode():  # whatever the caller's mode
        bridge = bridge_model(large, text(), layers=2, units=10, heads=1)
    tensors = [*large.state_dict().values(), *large.buffers()]
    theirs = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    ours = [*bridge.state_dict().values(), *bridge.buffers()]
    assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in ours}
    assert type(bridge) is type(large)
    assert not any(module.training for module in bridge.modules())
    assert all(p.requires_grad and p.dtype == dtype for p in bridge.parameters())
    assert bridge.lm_head.weight is bridge.model.embed_tokens.weight
    rotary = "model.rotary_emb.inv_freq"
    assert torch.equal(bridge.get_buffer(rotary), large.get_buffer(rotary))
    bridge(input_ids=text()[0]["input_ids"]).logits.sum().backward()
    assert all(p.grad is not None for p in bridge.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bridge_survives_saving(family, tmp_path):
    heads = 1 if family in (llama, qwen3) else None
    bridge = bridge_model(family(), text(), layers=[1, 3], units=7, heads=heads)
    bridge.save_pretrained(tmp_path)
    loaded = type(bridge).from_pretrained(tmp_path).eval()
    assert loaded.config.bridge == bridge.config.bridge
    assert json.loads(json.dumps(bridge.config.bridge)) == bridge.config.bridge
    assert torch.equal(logits(loaded), logits(bridge))


def test_padding_counts_for_nothing():
    large, batches = llama(), text()
    other = copy.deepcopy(batches)
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    made = [bridge_model(large, each, layers=2, units=0.5) for each in (batches, other)]
    assert made[0].config.bridge == made[1].config.bridge
    for ours, theirs in zip(made[0].parameters(), made[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_indices_without_anything_to_measure_need_no_text():
    large = bert()
    bridge = bridge_model(large, None, layers=(0, 3))
    made_of = dict(model="bert", layers=4, hidden=16, units=24, heads=4)
    assert bridge.config.bridge == dict(layers=[0, 3], units={}, heads={}, cut={}, of=made_of)
    for ours, theirs in ((0, 0), (1, 3)):
        pairs = zip(
            layers_of(bridge)[ours].parameters(), layers_of(large)[theirs].parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def test_kinds_of_attention_go_with_their_layers():
    types = ["full_attention", "sliding_attention"] * 2
    config = T.Qwen3Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, head_dim=4,
        num_key_value_heads=2, intermediate_size=24, layer_types=types, sliding_window=3,
        use_sliding_window=True,
    )  # fmt: skip
    bridge = bridge_model(T.Qwen3ForCausalLM(config), None, layers=[1, 2])
    assert bridge.config.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.self_attn.sliding_window for layer in layers_of(bridge)] == [3, None]


def test_a_layer_that_would_compute_something_else_is_refused():
    large = T.GPT2LMHeadModel(T.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(ValueError, match=r"layer 2: att.* scal.*(0\.166.* 0\.25|1 / 3.* 1 / 2)"):
        bridge_model(large, None, layers=[0, 2])
    assert torch.equal(logits(bridge_model(large, None, layers=[0, 1, 2, 3])), logits(large.eval()))
    large.base_model.forward = None  # is not run
    with pytest.raises(ValueError, match=r"layers=2 leaves no choice, give indices: .*layer 1"):
        bridge_model(large, text(), layers=2)


def test_a_bridge_does_not_go_by_the_name_of_the_large_model(tmp_path):
    peft = pytest.importorskip("peft")
    llama().save_pretrained(tmp_path / "large")
    large = T.LlamaForCausalLM.from_pretrained(tmp_path / "large")
    bridge = bridge_model(large, None, layers=[0, 2])
    assert large.name_or_path == large.config.name_or_path == str(tmp_path / "large")
    assert bridge.name_or_path == bridge.config.name_or_path == ""
    bridge.save_pretrained(tmp_path / "bridge")
    bridge = T.LlamaForCausalLM.from_pretrained(tmp_path / "bridge")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(bridge, config).save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.config.num_hidden_layers == 2
