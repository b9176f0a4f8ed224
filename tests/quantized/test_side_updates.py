"""Side updates: zero at first, exact displacements, beside weights of any kind."""

import copy
import math

import pytest
import torch
from quantized_models import FORMATS, batch, dequantised, layers, losses, network
from torch import nn

from zofo_kernels import Direction, noise
from zofo_optim import hybrid_param_groups
from zofo_optim.quantized.side_updates import add_side_updates, remove_side_updates, side_updates


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", FORMATS)
def test_outputs_keep_their_dtype_under_autocast(kind, dtype):
    model, x = network(kind, dtype), batch().to(dtype)
    layer = layers(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        side = next(iter(add_side_updates(model, rank=4).values()))
        with torch.no_grad():
            side.left.normal_()
    exact = before.float() + x.float() @ side.right @ side.left.t()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), exact.to(before.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_that_is_moved_to_the_meta_device_runs_there(dtype):
    model = nn.Sequential(nn.Linear(64, 32)).to(dtype).requires_grad_(False)
    add_side_updates(model, rank=4, include="0")
    output = model.to("meta")(torch.empty(6, 64, dtype=dtype, device="meta"))
    assert (output.shape, output.dtype) == ((6, 32), dtype)


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
