"""What a bridge kept: its weights are those of the large model there, and adapters fit back."""

import pytest
import torch
from bridged import INNER, bert, gpt2, layers_of, llama, logits, opt, outgoing, qwen3, text

from zofo_optim.transfer import transfer_adapter
from zofo_optim.transfer.bridge import bridge_model
from zofo_optim.transfer.kept import kept_key_units, kept_layers, kept_units
from zofo_optim.transfer.layers import stack_of

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]


@pytest.mark.parametrize("family", [llama, qwen3, bert, opt, gpt2])
def test_each_weight_is_the_part_of_the_large_one_that_was_kept(family):
    large = family()
    heads = dict(heads=1) if family in (llama, qwen3) else {}
    bridge = bridge_model(large, text(), layers=[0, 2], units=9, refit=False, **heads)
    name = stack_of(large).name
    assert kept_layers(bridge.config) == {0: 0, 2: 1}
    into, out = INNER[family]
    for inner in [*into, out, *(ATTENTION if heads else [])]:
        for k, layer in enumerate((0, 2)):
            ours = large.get_submodule(f"{name}.{layer}.{inner}").weight
            theirs = bridge.get_submodule(f"{name}.{k}.{inner}").weight
            sides = ("input", "output") if family is gpt2 else ("output", "input")
            for dim, side in enumerate(sides):
                kept = kept_units(bridge.config, f"{name}.{layer}.{inner}", side)
                if kept is not None:
                    ours = ours.index_select(dim, kept)
            assert torch.equal(ours, theirs)
            assert ours.shape != large.get_submodule(f"{name}.{layer}.{inner}").weight.shape


def test_keys_are_those_of_the_kept_heads():
    bridge = bridge_model(qwen3(), text(), layers=[1, 3], heads=1)
    for layer in (1, 3):
        (head,) = bridge.config.bridge["heads"][str(layer)]
        assert kept_key_units(bridge.config, layer).tolist() == [*range(8 * head, 8 * head + 8)]
    with pytest.raises(ValueError, match=r"layer 2 .* is not in the bridge, which has \[1, 3\]"):
        kept_key_units(bridge.config, 2)


def test_what_was_not_cut_is_kept_whole():
    bridge = bridge_model(llama(), text(), layers=[1, 3], units=9)
    assert kept_key_units(bridge.config, 1) is None
    assert kept_units(bridge.config, "model.layers.1.self_attn.q_proj", "output") is None
    assert kept_units(bridge.config, "model.layers.1.mlp.down_proj", "output") is None
    assert kept_units(bridge.config, "model.layers.0.self_attn.q_proj", "output") is None
    assert kept_units(bridge.config, "model.layers.1.experts.mlp.down_proj", "input") is None
    assert kept_layers(llama().config) is None
    assert kept_units(llama().config, "model.layers.0.mlp.down_proj", "input") is None
    with pytest.raises(ValueError, match=r"layer 0 .* is not in the bridge"):
        kept_units(bridge.config, "model.layers.0.mlp.down_proj", "input")
    with pytest.raises(ValueError, match=r"side must be one of .* got 'top'"):
        kept_units(bridge.config, "model.layers.1.mlp.down_proj", "top")


def test_an_adapter_of_a_bridge_does_the_same_in_the_large_model():
    """Where what was left out did nothing, both models are one function, with the adapter too."""
    peft = pytest.importorskip("peft")
    large = llama()
    with torch.no_grad():
        for layer in layers_of(large):
            layer.mlp.down_proj.weight[:, ::2] = 0
            layer.self_attn.o_proj.weight[:, :8] = 0
    bridge = bridge_model(large, text(), layers=4, units=0.5, heads=1)
    targets = [name.rpartition(".")[2] for name in (*ATTENTION, *INNER[llama][0], INNER[llama][1])]
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=targets)
    small = peft.get_peft_model(bridge, config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    before, wanted = logits(large), logits(small)
    carried, _ = transfer_adapter(small, large)
    found = logits(carried.eval())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("family", [bert, opt, gpt2])
def test_adapters_of_feed_forwards_do_the_same_in_the_large_model(family):
    """With other units cut in each layer, and without batches to measure anything on."""
    peft = pytest.importorskip("peft")
    large = family()
    with torch.no_grad():
        for layer in layers_of(large):
            if family is opt:  # whose other units may be off on all tokens
                layer.fc1.bias += 2
            weight = outgoing(family, layer)
            weight[:, torch.randperm(weight.shape[1])[: weight.shape[1] // 2]] = 0
    bridge = bridge_model(large, text(), layers=4, units=0.5)
    writes, reads = INNER[family]
    inner = "|".join(name.replace(".", r"\.") for name in (*writes, reads))
    targets = rf".*\.\d+\.({inner})"
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family is gpt2)
    small = peft.get_peft_model(bridge, config).eval()
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    before, wanted = logits(large), logits(small)
    carried, report = transfer_adapter(small, large)
    torch.testing.assert_close(logits(carried), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - before).norm() > 0.01 * before.norm()
    assert len(report.rows) == 4 * (len(writes) + 1)


@pytest.mark.parametrize("layers", [[1, 2], [3]])
@pytest.mark.parametrize("family", [llama, qwen3, bert, opt, gpt2])
def test_layers_compute_as_if_the_others_gave_out_what_they_read(family, layers):
    large = family()
    bridge = bridge_model(large, None, layers=layers)
    for k in {0, 1, 2, 3}.difference(layers):
        layers_of(large)[k].register_forward_hook(
            lambda _, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0]
        )
    assert torch.equal(logits(bridge), logits(large))


@pytest.mark.parametrize(
    "other",
    [
        dict(num_hidden_layers=5),
        dict(hidden_size=32),
        dict(intermediate_size=32),
        dict(num_key_value_heads=4),
    ],
)
def test_a_bridge_knows_of_which_model_it_is(other):
    peft = pytest.importorskip("peft")
    bridge = bridge_model(llama(), text(), layers=[1, 3], units=9)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    small, large = peft.get_peft_model(bridge, config), llama(**other)
    before = [*large.state_dict()]
    said = r"large must be the model of .*'layers': 4, 'hidden': 16, .*got one with \{'model': 'll"
    with pytest.raises(ValueError, match=said):
        transfer_adapter(small, large, text(), width="least_squares")
    assert [*large.state_dict()] == before
    del bridge.config.bridge["of"]  # as of earlier versions
    transfer_adapter(small, llama())
