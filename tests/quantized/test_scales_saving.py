"""Tuned scales in files: the format's own, zo_weights.safetensors and journals."""

import copy

import pytest
import torch
from quantized_llama import (
    ALONE,
    CONFIGS,
    KINDS,
    check_equal,
    loaded,
    optimizer_of,
    peft,
    saved_llama,
    trained,
    transformers,
    with_lora,
)
from quantized_models import bnb, layers, network, scales
from tiny_llama import TOKENS

from zofo_optim import (
    HybridZOFO,
    Journal,
    hybrid_param_groups,
    load_base_weights,
    load_hybrid,
    replay,
    save_base_weights,
    save_hybrid,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@KINDS
def test_save_pretrained(kind, dtype, base, tmp_path):
    model = loaded(base, kind, dtype)
    optimizer = optimizer_of(model)
    before = {name: scale.clone() for name, scale in scales(model).items()}
    trained(model, optimizer)
    assert all(not torch.equal(scale, before[name]) for name, scale in scales(model).items())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, device_map="cpu"
    )
    check_equal(model, again)


def test_save_pretrained_where_some_scales_are_quantised_still(base, tmp_path):
    model = loaded(base, "nf4 double")
    groups = hybrid_param_groups(
        model, zo=dict(lr=0.1, mu=1e-2), exclude="q_proj", quantized="scales", verbose=False
    )
    trained(model, HybridZOFO(groups))
    states = [layer.weight.quant_state for layer in layers(model) if hasattr(layer, "quant_state")]
    assert sorted(state.nested for state in states) == [False] * 6 + [True]
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").train()
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


@KINDS
def test_base_weights_of_an_adapter(kind, base, tmp_path):
    """Saved beside the adapter; loaded into the base model, with or without one."""
    model = with_lora(loaded(base, kind))
    optimizer = optimizer_of(model)
    trained(model, optimizer)
    file = save_base_weights(optimizer, model, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    again = loaded(base, kind)
    load_base_weights(again, file)
    check_equal(model, peft.PeftModel.from_pretrained(again, tmp_path / "adapter"))
    again = with_lora(loaded(base, kind))
    load_base_weights(again, tmp_path)
    assert all(map(torch.equal, scales(model).values(), scales(again).values()))


@pytest.mark.parametrize(
    ("kind", "recorded"),
    [("nf4 double", False), ("nf4 double", True), ("bnb int8", False), ("intx int4", True)],
)
def test_save_hybrid(kind, recorded, base, tmp_path):
    model = with_lora(loaded(base, kind))
    optimizer = optimizer_of(model)
    journal = None
    if recorded:
        journal = Journal(tmp_path / "run.journal").attach(optimizer, model=model)
    trained(model, optimizer)
    save_hybrid(model, optimizer, tmp_path / "tuned", journal=journal)
    again, state = load_hybrid(tmp_path / "tuned", loaded(base, kind))
    check_equal(model, again)
    other = optimizer_of(again)
    other.load_state_dict(state)
    if journal is not None:
        journal.close()
    check_equal(trained(model, optimizer), trained(again, other))


@pytest.mark.parametrize("kind", [*CONFIGS, ALONE])
def test_a_journal_remakes_the_scales(kind, base, tmp_path):
    model = loaded(base, kind)
    optimizer = optimizer_of(model)
    with Journal(tmp_path / "run.journal").attach(optimizer, model=model):
        trained(model, optimizer, steps=3)
    again = loaded(base, kind)
    done = replay(again, tmp_path / "run.journal")
    assert done.verified
    assert done.stop == 3
    check_equal(model, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_int4_for_cpus_in_files(dtype, base, tmp_path):
    model = loaded(base, ALONE, dtype)
    optimizer = optimizer_of(model)
    trained(model, optimizer)
    save_base_weights(optimizer, model, tmp_path)
    load_base_weights(again := loaded(base, ALONE, dtype), tmp_path)
    check_equal(model, again)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = loaded(base, ALONE, dtype)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    check_equal(model, again)


def test_an_adapter_beside_int4_for_cpus_gets_no_gradients(base):
    model = with_lora(loaded(base, ALONE))
    before = {name: scale.clone() for name, scale in scales(model).items()}
    with pytest.raises(RuntimeError, match=r"derivative for .*int4pack.* is not implemented"):
        trained(model, optimizer_of(model), steps=1)
    assert all(torch.equal(scale, before[name]) for name, scale in scales(model).items())


@pytest.mark.parametrize("kind", ["nf4", "bnb int8"])
def test_base_weights_bring_back_earlier_scales(kind, base, tmp_path):
    """As early stopping does, with the optimizer going on; bitsandbytes' state dicts do not."""
    model = loaded(base, kind)
    optimizer = optimizer_of(model)
    trained(model, optimizer)
    save_base_weights(optimizer, model, tmp_path)
    best, state = copy.deepcopy((model, optimizer.state_dict()))
    trained(model, optimizer)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*absmax|into non-quantized"):
        model.load_state_dict(best.state_dict())
    load_base_weights(model, tmp_path)
    optimizer.load_state_dict(state)
    check_equal(model, best)
    again = optimizer_of(best)
    again.load_state_dict(state)
    check_equal(trained(model, optimizer), trained(best, again))


def test_a_dense_model_of_trained_scales(base):
    """transformers' own way from 4 bits to dense weights knows the tuned scales."""
    model = loaded(base, "nf4 double")
    trained(model, optimizer_of(model))
    weights = [
        bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for layer in layers(model)
        if hasattr(layer, "quant_state")
    ]
    dense = copy.deepcopy(model).dequantize()
    found = [layer.weight for layer in layers(dense)][: len(weights)]
    assert len(weights) == 7
    for weight, other in zip(weights, found, strict=True):
        torch.testing.assert_close(other.to(weight.dtype), weight, rtol=2**-8, atol=0.0)


@pytest.mark.parametrize("hybrid", [False, True])
def test_scales_of_another_code_are_refused(hybrid, tmp_path):
    """NF4's and FP4's have the same names, shapes and dtypes."""
    model = network("nf4")
    optimizer = HybridZOFO(
        hybrid_param_groups(model, zo=dict(lr=0.1), quantized="scales", verbose=False)
    )
    optimizer.step(lambda: model(torch.ones(2, 64)).square().mean())
    if hybrid:
        save_hybrid(model, optimizer, tmp_path)
    else:
        save_base_weights(optimizer, model, tmp_path)
    other = network("fp4")
    before = {name: scale.clone() for name, scale in scales(other).items()}
    with pytest.raises(ValueError, match=r"got fp4 for '0.weight.absmax', which are of nf4"):
        load_base_weights(other, tmp_path)
    assert all(torch.equal(scale, before[name]) for name, scale in scales(other).items())
    again = network("nf4")
    load_base_weights(again, tmp_path)
    assert all(torch.equal(scale, scales(model)[name]) for name, scale in scales(again).items())
