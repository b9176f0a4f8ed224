"""Side updates as a LoRA adapter of peft's, read by peft itself and by the library."""

import warnings

import pytest
import torch
from quantized_models import dequantised, layers, quantised
from torch import nn

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.quantized.side_saving import load_side_updates, save_side_updates
from zofo_optim.quantized.side_updates import add_side_updates, remove_side_updates, side_updates

peft = pytest.importorskip("peft", reason="adapters need peft")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def small(kind="nf4"):
    model = quantised(Small(), kind)
    model.is_loaded_in_4bit = kind == "nf4"  # as transformers tells peft
    return model


def batch():
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(1))


def trained(kind="nf4", **options):
    model = small(kind)
    sides = add_side_updates(model, rank=4, seed=7, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for side in sides.values():
            side.left.copy_(0.1 * torch.randn(side.left.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", ["nf4", "intx int8"])
def test_peft_loads_them_beside_the_quantised_base(tmp_path, kind):
    model = trained(kind)
    save_side_updates(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        small(kind), str(tmp_path)
    ).train()  # bnb repacks in eval
    assert not torch.allclose(small(kind)(batch()), model(batch()), atol=1e-2)
    torch.testing.assert_close(loaded(batch()), model(batch()), rtol=1e-5, atol=1e-5)


def test_peft_merges_them_into_a_base_in_full_precision(tmp_path):
    model = trained("intx int8")
    save_side_updates(model, tmp_path)
    plain = Small().requires_grad_(False)
    for ours, layer in zip(layers(plain), layers(model), strict=True):
        ours.weight.data = dequantised(layer)
    merged = peft.PeftModel.from_pretrained(plain, str(tmp_path)).merge_and_unload()
    torch.testing.assert_close(merged(batch()), model(batch()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_some", [False, True])
def test_they_come_back_to_the_bit(tmp_path, has_some):
    model = trained()
    save_side_updates(model, tmp_path)
    fresh = small()
    if has_some:
        add_side_updates(fresh, rank=4, seed=7)
    found = load_side_updates(fresh, tmp_path)
    assert found.keys() == {"first", "second"}
    assert torch.equal(fresh(batch()), model(batch()))


def test_they_are_of_the_base_model_within_peft(tmp_path):
    def hybrid(folder=None):
        model = small()
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        if folder is None:
            add_side_updates(model, rank=4)
        else:
            load_side_updates(model, folder)
        return model

    model, x = hybrid(), batch()
    groups = hybrid_param_groups(
        model, zo=dict(lr=1e-2, mu=1e-3), fo=dict(lr=1e-2), quantized="low_rank", verbose=False
    )
    names = groups[0]["param_names"]
    assert "base_model.model.first.base_layer.side_update.left_seed_0" in names
    assert all("lora" in name for name in groups[1]["param_names"])
    optimizer = HybridZOFO(groups)
    before = model(x)
    optimizer.step(lambda: model(x).square().mean())
    assert not torch.equal(model(x), before)
    assert all(side.left.any() for side in side_updates(model).values())
    with pytest.warns(UserWarning, match=r"first\.base_layer\.bias"):
        save_side_updates(model, tmp_path / "sides")
    model.save_pretrained(str(tmp_path / "lora"))

    base = load_side_updates(small(), tmp_path / "sides")
    for ours, theirs in zip(base.values(), side_updates(model).values(), strict=True):
        assert torch.equal(ours.left, theirs.left)
        assert torch.equal(ours.right, theirs.right)
    again = hybrid(tmp_path / "sides")
    for ours, theirs in zip(
        side_updates(again).values(), side_updates(model).values(), strict=True
    ):
        assert torch.equal(ours.left, theirs.left)


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    save_side_updates(trained(), tmp_path)
    other = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="'first' with 64 inputs and 64 outputs, got None"):
        load_side_updates(other, tmp_path)
    fresh = small()
    sides = add_side_updates(fresh, rank=4, seed=8)
    with pytest.raises(ValueError, match=r"got 2 of rank and seed \[\(4, 8\)\]"):
        load_side_updates(fresh, tmp_path)
    assert not any(side.left.any() for side in sides.values())
    remove_side_updates(fresh)
    with pytest.raises(ValueError, match="model must have side updates, got none"):
        save_side_updates(fresh, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"side_updates\.json"):
        load_side_updates(fresh, tmp_path / "nowhere")
    with pytest.raises(TypeError, match="model must be"):
        load_side_updates("model", tmp_path)
    with pytest.raises(TypeError, match="model must be"):
        save_side_updates("model", tmp_path)


def test_layers_that_peft_replaces_get_none():
    """A module to save stands in for the base's own, and learns by gradients."""
    config = peft.LoraConfig(target_modules=["first"], modules_to_save=["second"])
    model = peft.get_peft_model(Small(), config)
    sides = add_side_updates(model, include=".")
    assert list(sides) == ["base_model.model.first.base_layer"]


def test_subspaces_of_a_part_are_not_taken_for_those_of_the_whole(tmp_path):
    part = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    whole = nn.Module()
    whole.body = part
    add_side_updates(whole.body, include=".", rank=4)
    save_side_updates(whole, tmp_path)
    other = nn.Module()
    other.body = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    with pytest.raises(ValueError, match="subspaces"):
        load_side_updates(other, tmp_path)
    assert not side_updates(other)


def test_another_adapter_is_not_written_over(tmp_path):
    peft.get_peft_model(Small(), peft.LoraConfig(target_modules=["first"])).save_pretrained(
        tmp_path
    )
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another adapter"):
        save_side_updates(trained(), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_exclude_by_the_weight_s_name():
    model = small()
    groups = hybrid_param_groups(
        model, zo=dict(lr=1.0), quantized="low_rank", exclude=r"second\.weight", verbose=False
    )
    names = [name for group in groups for name in group["param_names"]]
    assert "first.side_update.left_seed_0" in names
    assert "second.side_update.left_seed_0" not in names


def save_without_warnings(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_side_updates(model, folder)


def test_what_else_learns_is_named(tmp_path):
    """Biases here: the folder alone is another model."""
    model = small("intx int8")
    zo = dict(lr=1.0)
    hybrid_param_groups(model, zo=zo, quantized="low_rank", verbose=False)
    with pytest.warns(UserWarning, match=r"2 other tensors .* such as 'first\.bias'.*save_hybrid"):
        save_side_updates(model, tmp_path)
    hybrid_param_groups(model, zo=zo, quantized="low_rank", include="side_update", verbose=False)
    save_without_warnings(model, tmp_path)


def test_what_an_adapter_s_files_hold_is_not_named(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"])
    model = peft.get_peft_model(small("intx int8"), config)
    groups = hybrid_param_groups(
        model,
        zo=dict(lr=1e-2),
        fo=dict(lr=1e-2),
        include="side_update",
        quantized="low_rank",
        verbose=False,
    )
    assert len(groups) == 2
    save_without_warnings(model, tmp_path)


def test_a_reloaded_model_is_not_packed_anew(tmp_path):
    """As bitsandbytes does in eval() on CPUs with AVX512-BF16, where it rounds or fails."""
    model = trained()
    save_side_updates(model, tmp_path)
    fresh = small()
    for layer in layers(fresh):
        layer.support_avx512bf16_for_cpu = True
    load_side_updates(fresh, tmp_path)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers(fresh))
    with torch.no_grad():
        assert torch.equal(fresh.eval()(batch()), model(batch()))


def test_weights_of_side_updates_ask_for_them(tmp_path):
    from zofo_optim import load_base_weights, save_base_weights

    model = small()
    optimizer = HybridZOFO(
        hybrid_param_groups(model, zo=dict(lr=1.0), quantized="low_rank", verbose=False)
    )
    save_base_weights(optimizer, model, tmp_path)
    with pytest.raises(ValueError, match="call add_side_updates first"):
        load_base_weights(small(), tmp_path)
