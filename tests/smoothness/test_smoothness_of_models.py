"""Transformers with adapters: attention has second derivatives, and checkpointed layers too."""

import pytest
import torch

from zofo_optim.smoothness import measure_smoothness

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(base, lora).double()


@pytest.fixture
def closure(model):
    ids = torch.randint(32, (2, 7))
    return lambda: model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("checkpointed", [False, True])
def test_differences_agree_with_double_backward(model, closure, checkpointed):
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    one, two = (
        measure_smoothness(model, closure, directions=4, method=method)
        for method in ("finite_difference", "exact")
    )
    assert set(one) == {"zo", "fo"}
    for name in one:
        assert one[name].frobenius == pytest.approx(two[name].frobenius, rel=1e-2)
        assert one[name].largest == pytest.approx(two[name].largest, rel=2e-2)


def test_layers_are_named(model, closure):
    found = measure_smoothness(model, closure, by="layer", directions=2, largest=False)
    inside = "base_model.model.model"
    assert {f"{mode}, {inside}.layers.{k}" for mode in ("zo", "fo") for k in (0, 1)} < set(found)
    assert sum(block.parameters for block in found.values()) == sum(
        p.numel() for p in model.parameters()
    )
