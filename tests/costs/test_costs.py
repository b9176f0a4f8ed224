"""FLOPs and kept bytes of any chosen tensors equal those of a real backward."""

import pytest
import torch
import torch.nn.functional as F
from costed_models import backward_flops, choices, made, saved_bytes, step_peak
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zofo_optim.costs import Costs, TensorCost, costs_of

PLAIN = ["convolutions", "encoder", "bilinear"]
HUGGING_FACE = ["llama", "llama_tied", "opt", "gpt2", "bert", "t5_eager", "vit"]
OTHERS = ["mixtral", "lora", "dora"]  # they save much for what the loss does not need


@pytest.mark.parametrize("name", PLAIN + HUGGING_FACE + OTHERS)
def test_flops_and_bytes_are_those_of_a_real_backward(name):
    if name not in PLAIN:
        pytest.importorskip("transformers")
    if name in ("lora", "dora"):
        pytest.importorskip("peft")
    model, closure = made(name)
    costs = costs_of(model, closure)
    names = [t.name for t in costs.tensors]
    assert costs.flops(names) > 0
    for chosen in choices(names, 8):
        assert costs.flops(chosen) == backward_flops(model, closure, chosen)
        if name not in OTHERS:
            assert costs.kept(chosen) == saved_bytes(model, closure, chosen)
        assert costs.flops_bound(chosen) >= costs.flops(chosen)
        assert costs.bytes_bound(chosen) >= costs.bytes(chosen)
    assert costs.flops_bound(names) == costs.flops(names)
    assert costs.bytes_bound(names) == costs.bytes(names)


def test_a_mask_that_learns_decides_how_attention_is_computed():
    pytest.importorskip("transformers")
    model, closure = made("t5")
    costs = costs_of(model, closure)
    names = [t.name for t in costs.tensors]
    tables = [name for name in names if "relative_attention_bias" in name]
    assert len(tables) == 2
    without = [name for name in names if name not in tables]
    for chosen in (*choices(names, 3), without, [*without, tables[0]]):
        assert costs.flops(chosen) == backward_flops(model, closure, chosen)
        real = saved_bytes(model, closure, chosen)
        assert real <= costs.kept(chosen) <= 1.06 * real
        assert costs.flops_bound(chosen) >= costs.flops(chosen)
        assert costs.bytes_bound(chosen) >= costs.bytes(chosen)
    real = step_peak(model, closure, without, torch.optim.SGD, lr=0.1)
    assert costs.peak(without) == pytest.approx(real, rel=0.1)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_chains_of_layers(data):
    layers, width = [], 3
    for _ in range(data.draw(st.integers(1, 4))):
        kind, wide = data.draw(st.sampled_from(["linear", "norm", "tanh"])), 3
        if kind == "linear":
            wide = data.draw(st.integers(1, 5))
            layers.append(nn.Linear(width, wide, bias=data.draw(st.booleans())))
            width = wide
        else:
            layers.append(nn.LayerNorm(width) if kind == "norm" else nn.Tanh())
    model = nn.Sequential(*layers, nn.Linear(width, 2))
    x = torch.randn(4, 3)
    closure = lambda: model(x).square().mean()  # noqa: E731
    costs = costs_of(model, closure)
    names = [t.name for t in costs.tensors]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    assert costs.flops(chosen) == backward_flops(model, closure, chosen)
    # the graph of a chain has one way: shares add up to what is due
    assert costs.flops_bound(chosen) == costs.flops(chosen)


def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5, bias=False))
    x = torch.randn(2, 3)
    return model, lambda: model(x).square().mean()


def test_by_hand():
    costs = costs_of(*two_layers(), fo_optimizer=torch.optim.SGD, fo=dict(lr=0.1, momentum=0.9))
    top, bias, weight = costs.tensors
    assert [t.name for t in costs.tensors] == ["2.weight", "0.bias", "0.weight"]
    assert top.weight_flops == 2 * 2 * 4 * 5
    assert bias.weight_flops == 0
    assert bias.path_flops == 2 * 2 * 4 * 5  # the error, through the top weight
    assert (weight.weight_flops, weight.path_flops) == (2 * 2 * 3 * 4, 0)
    assert costs.forward_flops == 2 * 2 * (3 * 4 + 4 * 5)
    assert [t.gradient_bytes for t in costs.tensors] == [80, 16, 48]
    assert [t.state_bytes for t in costs.tensors] == [80, 16, 48]
    assert costs.weights_bytes == 80 + 16 + 48
    # tanh's output is kept for its own backward, and for the top weight's gradient; the squares'
    # input for all; x was there before
    assert costs.kept(["2.weight"]) == costs.kept(["0.bias"]) == 4 * 2 * 4 + 4 * 2 * 5
    assert costs.bytes(["2.weight", "0.bias"]) == 72 + 96 + 96
    assert costs.bytes(["2.weight", "0.bias"], in_backward=True) == 72 + 80 + 96
    assert costs.flops([]) == costs.bytes([]) == 0


def test_an_input_of_several_weights_counts_once():
    q, k = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    model = nn.ModuleList([nn.LayerNorm(4), q, k])
    x = torch.randn(2, 4)

    def closure():
        h = model[0](x)
        return (q(h) + k(h)).sum()

    costs = costs_of(model, closure)
    shares = {t.name: t for t in costs.tensors}
    assert shares["1.weight"].input == shares["2.weight"].input is not None
    assert shares["1.weight"].input_bytes == shares["2.weight"].input_bytes == 32
    both, one = costs.kept(["1.weight", "2.weight"]), costs.kept(["1.weight"])
    assert both == one == 32


def test_tied_weights_are_one_tensor_at_the_lowest_use():
    pytest.importorskip("transformers")
    model, closure = made("llama_tied")
    costs = costs_of(model, closure)
    assert costs.tensors[-1].name == "model.embed_tokens.weight"
    assert costs.tensors[-1].weight_flops == 2 * 2 * 8 * 16 * 64  # its use as the head


def test_unused_candidates_are_named():
    model = nn.ModuleDict(dict(used=nn.Linear(3, 2), other=nn.Linear(3, 2)))
    x = torch.randn(2, 3)

    def closure():
        model["other"](x)  # without effect on the loss
        return model["used"](x).sum()

    costs = costs_of(model, closure)
    assert costs.unused == ("other.weight", "other.bias")
    assert {t.name for t in costs.tensors} == {"used.weight", "used.bias"}
    with pytest.raises(ValueError, match=r"other\.bias', which the loss does not depend on"):
        costs.flops(["other.bias"])


def test_candidates_are_what_requires_gradients_or_all():
    model, closure = two_layers()
    model[2].requires_grad_(False)
    assert [t.name for t in costs_of(model, closure).tensors] == ["0.bias", "0.weight"]
    model.requires_grad_(False)
    assert len(costs_of(model, closure).tensors) == 3
    assert not any(p.requires_grad for p in model.parameters())
    given = costs_of(model, closure, {"mine": model[2].weight})
    assert [t.name for t in given.tensors] == ["mine"]


def test_an_input_that_requires_gradients_is_always_on_the_way():
    model, _ = two_layers()
    x = torch.randn(2, 3, requires_grad=True)
    closure = lambda: model(x).square().mean()  # noqa: E731
    costs = costs_of(model, closure)
    assert x.grad is None
    for chosen in (["2.weight"], ["0.bias"], ["2.weight", "0.weight"]):
        assert costs.flops(chosen) == backward_flops(model, closure, chosen)
    assert costs.flops([]) == 0


def test_autocast_and_masks_of_booleans():
    model, _ = two_layers()
    x, wanted = torch.randn(4, 3), torch.tensor([True, False, True, True])

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return F.mse_loss(model(x)[wanted].float(), torch.ones(3, 5))

    costs = costs_of(model, closure)
    for chosen in choices([t.name for t in costs.tensors], 4):
        assert costs.flops(chosen) == backward_flops(model, closure, chosen)
        assert costs.peak(chosen) > costs.weights_bytes


def test_hand_made_costs_have_bounds():
    rows = [
        TensorCost("a", 1, 5, 1, 4, 4, path_bytes=10, own_bytes=1, input_bytes=7, input=0),
        TensorCost("b", 1, 3, 2, 4, 0, path_bytes=20, own_bytes=0, input_bytes=7, input=0),
    ]
    costs = Costs(tuple(rows), forward_flops=0, weights_bytes=0, forward_bytes=0)
    assert costs.flops_bound(["b"]) == 1 + 2 + 3
    assert costs.bytes_bound(["a", "b"]) == 10 + 20 + 1 + 7 + 8 + 4
    with pytest.raises(ValueError, match="must come from costs_of"):
        costs.peak(["a"])
    with pytest.raises(TypeError, match="a collection of names"):
        costs.flops("a")
    with pytest.raises(ValueError, match="'c', no candidate"):
        costs.flops(["c"])
