"""Side updates: zero at first, exact displacements, beside weights of any kind."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from quantized_models import FORMATS, dequantised, layers, network
from torch import nn

from zofo_kernels import Direction, noise
from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, load_base_weights, replay
from zofo_optim.base_weights import save_base_weights
from zofo_optim.journal import JournalError
from zofo_optim.quantized.side_updates import add_side_updates, remove_side_updates, side_updates

ZO = dict(lr=1e-2, mu=1e-2)
WAYS = {
    "in place": {},
    "streamed": dict(perturbation="streamed"),
    "low rank": dict(structure="low_rank", perturbation="streamed"),
    "per example": dict(structure="low_rank", perturbation="streamed", directions="per_example"),
}


def batch(rows=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 64, generator=generator)


def losses(model, x):
    return model(x).square().mean(1)


class Packed(nn.Module):
    """A layer as of GPTQ: integers in a buffer, no parameter."""

    def __init__(self, layer):
        super().__init__()
        self.infeatures, self.outfeatures = layer.in_features, layer.out_features
        self.register_buffer("qweight", (layer.weight.data * 64).round().to(torch.int32))

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) / 64).t()


@pytest.mark.parametrize("kind", FORMATS)
def test_outputs_are_the_same_bits_before_training(kind):
    model, x = network(kind), batch()
    before, weights = model(x), [dequantised(layer).clone() for layer in layers(model)]
    assert list(add_side_updates(model, rank=4)) == ["0", "2"]
    assert torch.equal(model(x), before)
    for layer, weight in zip(layers(model), weights, strict=True):
        assert torch.equal(dequantised(layer), weight)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_displacement_is_that_of_the_dequantised_weight(kind, rank):
    if kind == "bnb int8":
        pytest.skip("its layer quantises activations: tested by its own output below")
    model, x = network(kind), batch()
    sides = add_side_updates(model, rank=rank, seed=3)
    dense = nn.Sequential(*(nn.Linear(*s, bias=False) for s in ((64, 64), (64, 32))))
    mu = 0.1
    for ours, layer, side in zip(dense, layers(model), sides.values(), strict=True):
        u = noise(side.left.shape, Direction(5, 0, 0), index=1)
        v = side.right * math.sqrt(rank)
        assert v.abs().unique().tolist() == [1.0]
        ours.weight.data = dequantised(layer).float() + mu * u @ v.t() / math.sqrt(rank)
        with torch.no_grad():
            side.left.copy_(mu * u)
    expected = losses(nn.Sequential(dense[0], nn.Tanh(), dense[1]), x)
    torch.testing.assert_close(losses(model, x), expected, rtol=1e-5, atol=1e-6)


def test_beside_a_layer_that_quantises_activations_the_update_is_added_to_what_it_returns():
    model, x = network("bnb int8"), batch()
    layer = layers(model)[0]
    before = layer(x)
    side = next(iter(add_side_updates(model, rank=4).values()))
    with torch.no_grad():
        side.left.normal_()
    torch.testing.assert_close(layer(x), before + x @ side.right @ side.left.t())


@pytest.mark.parametrize("way", WAYS)
def test_training_lowers_the_loss_and_leaves_the_weights_alone(way):
    model, x = network("nf4"), batch()
    weights = [layer.weight.detach().clone() for layer in layers(model)]
    groups = hybrid_param_groups(
        model,
        zo=ZO,
        quantized="low_rank",
        verbose=False,
        directions=WAYS[way].get("directions", "shared"),
    )
    optimizer = HybridZOFO(groups, **WAYS[way])
    assert [g["param_names"] for g in groups] == [
        ["0.side_update.left_seed_0", "2.side_update.left_seed_0"]
    ]

    def closure():
        each = losses(model, x)
        return each if way == "per example" else each.mean()

    before = closure().mean()
    for _ in range(40):
        optimizer.step(closure)
    assert closure().mean() < 0.9 * before
    for layer, weight in zip(layers(model), weights, strict=True):
        assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("way", ["in place", "streamed"])
def test_a_step_is_the_one_of_the_low_rank_direction_in_closed_form(way):
    """L <- L - lr c u, with c the slope of the loss along u V^T / sqrt(r) of both weights."""
    model, x = network("intx int4"), batch()
    sides = add_side_updates(model, rank=4)
    plain = [dequantised(layer).float() for layer in layers(model)]
    optimizer = HybridZOFO(
        hybrid_param_groups(model, zo=ZO, quantized="low_rank", verbose=False), seed=9, **WAYS[way]
    )
    directions = [
        noise(side.left.shape, Direction(9, 0, 0), index=i) for i, side in enumerate(sides.values())
    ]

    def loss(sign):
        moved = [
            w + sign * ZO["mu"] * u @ side.right.t()
            for w, u, side in zip(plain, directions, sides.values(), strict=True)
        ]
        return F.linear(F.linear(x, moved[0]).tanh(), moved[1]).square().mean()

    slope = (loss(1) - loss(-1)) / (2 * ZO["mu"])
    optimizer.step(lambda: losses(model, x).mean())
    for u, side in zip(directions, sides.values(), strict=True):
        torch.testing.assert_close(side.left.data, -ZO["lr"] * slope * u, rtol=2e-3, atol=1e-6)


def test_an_estimate_is_that_of_the_gradient_on_average():
    """Over V, the mean of G V V^T / r is G: mu and lr mean what they do for full directions."""
    gradient = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros_like(gradient)
    count = 400
    for seed in range(count):
        model = nn.Sequential(nn.Linear(64, 8))
        side = add_side_updates(model, rank=4, seed=seed, include="0")["0"]
        total += gradient @ side.right @ side.right.t() / count
    error = (total - gradient).norm() / gradient.norm()
    assert error < 1.5 * math.sqrt(64 / 4 / count)  # its standard deviation is near that root


def test_a_model_in_16_bits_gets_outputs_in_16_bits_that_round_once():
    model, x = network("nf4", torch.bfloat16), batch().bfloat16()
    layer = layers(model)[0]
    before = layer(x)
    side = next(iter(add_side_updates(model, rank=4).values()))
    with torch.no_grad():
        side.left.normal_()
    exact = before.float() + x.float() @ side.right @ side.left.t()
    assert torch.equal(layer(x), exact.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), exact.bfloat16())


def test_layers_without_a_parameter_and_of_conv1d_get_updates():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    packed = Packed(nn.Linear(64, 48))
    model, x = nn.Sequential(packed, Conv1D(32, 48)).requires_grad_(False), batch()
    before = model(x)
    assert list(add_side_updates(model, rank=2)) == ["0"]
    assert torch.equal(model(x), before)
    remove_side_updates(model)
    sides = add_side_updates(model, rank=2, include=".*")
    assert [(len(s.right), len(s.left)) for s in sides.values()] == [(64, 48), (48, 32)]
    with torch.no_grad():
        sides["1"].left.normal_()
    hidden = packed(x)
    weight = model[1].weight + (sides["1"].left @ sides["1"].right.t()).t()
    torch.testing.assert_close(model(x), hidden @ weight + model[1].bias)


def test_quanto_layers_get_updates():
    quanto = pytest.importorskip("optimum.quanto", reason="quanto layers need optimum-quanto")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False), batch()
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    before = model(x)
    hybrid_param_groups(model, quantized="low_rank", verbose=False)
    side = side_updates(model)["0"]
    assert torch.equal(model(x), before)
    with torch.no_grad():
        side.left.normal_()
    torch.testing.assert_close(model(x), before + x @ side.right @ side.left.t())


def test_right_factors_depend_on_layer_and_seed_alone():
    first = add_side_updates(network("nf4"), rank=4, seed=1)
    second = add_side_updates(network("intx int4"), rank=4, seed=1, include="2")
    other = add_side_updates(network("nf4"), rank=4, seed=2)
    assert torch.equal(first["2"].right, second["2"].right)
    assert not torch.equal(first["2"].right, other["2"].right)
    assert not torch.equal(first["0"].right, first["2"].right)


def trained(way="in place", steps=5, journal=None):
    model, x = network("intx int4"), batch()
    groups = hybrid_param_groups(model, zo=ZO, quantized="low_rank", verbose=False)
    optimizer = HybridZOFO(groups, **WAYS[way])
    with nullcontext() if journal is None else Journal(journal).attach(optimizer):
        for _ in range(steps):
            optimizer.step(lambda: losses(model, x).mean())
    return model, optimizer


def test_a_journal_remakes_what_was_learnt(tmp_path):
    model, _ = trained(journal=tmp_path / "run.zofo")
    fresh = network("intx int4")
    add_side_updates(fresh)
    replay(fresh, tmp_path / "run.zofo")
    assert torch.equal(fresh(batch()), model(batch()))
    other = network("intx int4")
    add_side_updates(other, seed=1)
    with pytest.raises(JournalError, match="left_seed_0"):
        replay(other, tmp_path / "run.zofo")


def test_checkpoints_go_on_to_the_bit():
    whole, _ = trained(steps=6)
    model, optimizer = trained(steps=3)
    fresh = network("intx int4")
    groups = hybrid_param_groups(fresh, zo=ZO, quantized="low_rank", verbose=False)
    again = HybridZOFO(groups)
    for name, side in side_updates(fresh).items():
        side.load_state_dict(side_updates(model)[name].state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        again.step(lambda: losses(fresh, batch()).mean())
    assert torch.equal(fresh(batch()), whole(batch()))


def test_base_weights_hold_them(tmp_path):
    model, optimizer = trained()
    save_base_weights(optimizer, model, tmp_path)
    fresh = network("intx int4")
    with pytest.raises(ValueError, match="left_seed_0"):
        load_base_weights(fresh, tmp_path)
    add_side_updates(fresh)
    load_base_weights(fresh, tmp_path)
    assert torch.equal(fresh(batch()), model(batch()))


def test_removed_ones_leave_the_model_as_it_was():
    model, x = network("nf4"), batch()
    before, keys = model(x), set(model.state_dict())
    sides = add_side_updates(model)
    with torch.no_grad():
        sides["0"].left.normal_()
    assert not torch.equal(model(x), before)
    remove_side_updates(model)
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) == keys
    assert not side_updates(model)


def test_copies_have_their_own():
    model, x = network("nf4"), batch()
    add_side_updates(model, rank=4)
    copied = copy.deepcopy(model)
    before = model(x)
    with torch.no_grad():
        side_updates(copied)["0"].left.normal_()
    assert torch.equal(model(x), before)
    assert not torch.equal(copied(x), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank must be an int in"),
        (dict(rank=True), "rank must be an int in"),
        (dict(seed=-1), "seed must be an int in"),
        (dict(include="nothing"), "include must match names of linear layers, got 'nothing'"),
        (dict(exclude=("0", "2")), "must have linear layers of quantised weights"),
    ],
)
def test_bad_arguments_are_told_and_change_nothing(options, message):
    model = network("nf4")
    with pytest.raises(ValueError, match=message):
        add_side_updates(model, **options)
    assert not side_updates(model)


def test_a_second_call_is_refused():
    model = network("nf4")
    add_side_updates(model)
    with pytest.raises(ValueError, match="no side updates yet, got one in '0'"):
        add_side_updates(model)


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="'0' on the meta device"):
        add_side_updates(model, include="0")


def test_they_stay_in_fp32_where_the_model_is_converted():
    model = network("intx int8")
    (side, *_) = add_side_updates(model, rank=3).values()
    before = side.right.clone()
    model.to(torch.bfloat16)
    model.double()
    assert side.left.dtype == side.right.dtype == torch.float32
    assert torch.equal(side.right, before)
    assert isinstance(side.left, nn.Parameter)
