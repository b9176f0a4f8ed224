"""Scales of each format are found, named, moved and put back, as the format's own library reads."""

import copy

import pytest
import torch
from quantized_models import FORMATS, NAMES, bnb, dequantised, layers, network, scales
from torch import nn

from zofo_kernels import Direction, noise
from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.quantized import prepare, unit_of

KINDS = list(FORMATS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
MU, LR = 2.0**-6, 0.25
ULP = 2.0**-23
X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


def groups_of(model, **options):
    zo = dict(lr=LR, mu=MU, **options)
    return hybrid_param_groups(model, zo=zo, quantized="scales", verbose=False)


def along(groups, start, length, seed=7):
    """The scales at a distance from the start along the first direction, in units of the groups."""
    found = {}
    for group in groups:
        for name, index in zip(group.names, group.indices, strict=True):
            v = noise(start[name].shape, Direction(seed, 0, 0, "rademacher"), index=index)
            found[name] = start[name] + length * group.unit * v
    return found


def copied(model):
    return {name: tensor.cpu().clone() for name, tensor in scales(model).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_units(kind):
    model = network(kind)
    groups = groups_of(model)
    named = {name: p for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)}
    assert sorted(named) == [f"0.{NAMES[kind]}", f"2.{NAMES[kind]}"]
    for group in groups:
        for p in group["params"]:
            assert p.dtype == torch.float32
            assert group["unit"] == unit_of(p)
            assert 2**-0.5 <= p.square().mean().sqrt().item() / group["unit"] <= 2**0.5
    if kind[0] in "nfb":  # keys of the library's own state dict
        assert set(named) <= set(model.state_dict())


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_weights_move_with_their_scales(kind, dtype):
    """At each point the library's own weights are those of the scales s + sign mu unit v."""
    model = network(kind, dtype)
    optimizer = HybridZOFO(groups_of(model), seed=7, distribution="rademacher")
    start, expected, seen = copied(model), copy.deepcopy(model), []

    def closure():
        seen.append((copied(model), [dequantised(layer) for layer in layers(model)]))
        return sum(weight.float().square().sum() for weight in seen[-1][1])

    optimizer.backward(closure)
    for (now, weights), sign in ((seen[0], 1), (seen[-1], -1)):
        for name, scale in along(optimizer.zo_groups(), start, sign * MU).items():
            # to the bit on the way forth, from there to an ulp: weights move by recovering first
            check_close(now[name], scale, exact=sign > 0)
            scales(expected)[name].copy_(now[name])
        for got, layer in zip(weights, layers(expected), strict=True):
            assert torch.equal(got, dequantised(layer))
    assert not torch.equal(seen[0][1][0], seen[-1][1][0])
    for name, scale in scales(model).items():
        check_close(scale, start[name])


def check_close(scale, wanted, exact=False):
    """To an ulp, or to the bit; scales of 16 bits round in each move."""
    if scale.dtype == torch.float32:
        torch.testing.assert_close(scale, wanted, rtol=0.0 if exact else ULP, atol=0.0)
    else:
        atol = torch.finfo(scale.dtype).eps * wanted.abs().max().item()
        torch.testing.assert_close(scale.float(), wanted.float(), rtol=0.0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_follows_the_formula(kind):
    """s <- s - lr unit c v, with c the difference of losses over 2 mu."""
    model = network(kind)
    optimizer = HybridZOFO(groups_of(model), seed=7, distribution="rademacher")
    start, losses = copied(model), []

    def closure():
        losses.append(model(X).square().mean())
        return losses[-1]

    optimizer.step(closure)
    slope = (losses[0] - losses[-1]).item() / (2 * MU)
    assert slope == pytest.approx(optimizer.projected_grads[0, 0].item(), rel=1e-5)
    assert slope != 0.0
    wanted = along(optimizer.zo_groups(), start, -LR * slope)
    for name, scale in scales(model).items():
        torch.testing.assert_close(scale, wanted[name], rtol=8 * ULP, atol=0.0)
        assert not torch.equal(scale, start[name])


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_preparing_changes_no_weight(kind, dtype, capsys):
    model = network(kind, dtype)
    before = [dequantised(layer) for layer in layers(model)]
    hybrid_param_groups(model, zo=dict(lr=LR), quantized="scales")
    for layer, weight in zip(layers(model), before, strict=True):
        assert torch.equal(dequantised(layer), weight)
    said = ""
    if kind == "nf4 double":
        said = "scales of 2 weights expanded from 8 bits (double quantisation) to fp32"
    elif kind.startswith("intx") and dtype == torch.bfloat16:
        said = "scales of 2 weights expanded from 16 bits to fp32"
    printed = capsys.readouterr().out
    assert said in printed
    assert bool(said) == ("expanded" in printed)
    assert prepare(model) == {}


@pytest.mark.parametrize("kind", ["nf4", "nf4 double"])
def test_weights_that_were_packed_for_the_cpu(kind):
    """Evaluations without gradients pack weights, with scales of their own, where the CPU can."""
    model = network(kind, train=False)
    exact = [dequantised(layer) for layer in layers(model)]
    pack(model)
    groups = groups_of(model)
    assert sorted(n for g in groups for n in g["param_names"]) == [
        f"{i}.weight.absmax" for i in "02"
    ]
    for layer, weight in zip(layers(model), exact, strict=True):
        torch.testing.assert_close(dequantised(layer), weight, rtol=2**-8, atol=0.0)
    steps_move_what_is_evaluated(model, groups)


def pack(model):
    """As Linear4bit does where the CPU has AVX512-BF16."""
    for layer in layers(model):
        weight = layer.weight
        weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
            weight.data, weight.quant_state
        )
        assert weight.absmax.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "nf4 double"])
@pytest.mark.parametrize(
    "options",
    [
        dict(quantized="frozen"),
        dict(quantized="low_rank"),
        dict(quantized="scales", include=r"^0\."),
    ],
    ids=str,
)
def test_packed_weights_that_do_not_learn_let_gradients_pass(kind, options, capsys):
    """Products with packed ones have no derivatives."""
    found = []
    for packed in (False, True):
        model = network(kind, train=False)
        if packed:
            pack(model)
        model.adapter = nn.Parameter(torch.zeros(64))
        capsys.readouterr()
        zo = None if options["quantized"] == "frozen" else dict(lr=LR, mu=MU)
        hybrid_param_groups(model, zo=zo, fo=dict(lr=LR), **options)
        assert ("unpacked from the CPU layout" in capsys.readouterr().out) == packed
        layer, _, last = list(model)[:3]
        last(layer(X + model.adapter)).square().mean().backward()
        found.append(model.adapter.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(found[1], found[0], rtol=2**-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "nf4 double"])
def test_weights_are_not_packed_from_then_on(kind):
    model = network(kind, train=False)
    for layer in layers(model):
        layer.support_avx512bf16_for_cpu = True
    steps_move_what_is_evaluated(model, groups_of(model))
    assert not any(
        getattr(n.weight.quant_state, "packing_format_for_cpu", 0) for n in layers(model)
    )


def steps_move_what_is_evaluated(model, groups):
    before, optimizer = copied(model), HybridZOFO(groups)
    with torch.no_grad():
        first = model(X)
    optimizer.step(lambda: model(X).square().mean())
    assert scales(model).keys() == before.keys()
    assert all(not torch.equal(scale, before[name]) for name, scale in scales(model).items())
    with torch.no_grad():
        assert not torch.equal(model(X), first)


@pytest.mark.parametrize("kind", ["nf4", "bnb int8"])
def test_embeddings(kind):
    made = {"nf4": bnb.nn.EmbeddingNF4, "bnb int8": bnb.nn.Embedding8bit}[kind](32, 64).to("cpu")
    model = nn.Sequential(made).requires_grad_(False)
    groups = groups_of(model)
    assert groups[0]["param_names"] == [f"0.{NAMES[kind]}"]
    optimizer, tokens = HybridZOFO(groups), torch.arange(32)
    before = model(tokens)
    optimizer.step(lambda: model(tokens).square().mean())
    assert not torch.equal(model(tokens), before)


def test_zero_points_that_are_floats_learn():
    model = network("intx int4")
    for layer in layers(model):
        layer.weight.zero_point = layer.weight.zero_point.float() + 0.5
    names = {f"{i}.weight.{part}" for i in "02" for part in ("scale", "zero_point")}
    optimizer = HybridZOFO(groups_of(model), seed=7, distribution="rademacher")
    assert {name for group in optimizer.zo_groups() for name in group.names} == names
    start = copied(model)
    optimizer.step(lambda: model(X).square().mean())
    wanted = along(optimizer.zo_groups(), start, -LR * optimizer.projected_grads[0, 0].item())
    for name, scale in scales(model).items():
        torch.testing.assert_close(scale, wanted[name], rtol=8 * ULP, atol=0.0)
        assert not torch.equal(scale, start[name])
    for layer in layers(model):
        packed = layer.weight
        by_group = packed.qdata.float().unflatten(1, (-1, 32)) - packed.zero_point.unsqueeze(2)
        torch.testing.assert_close(
            dequantised(layer), (by_group * packed.scale.unsqueeze(2)).flatten(1)
        )


def test_zero_points_in_a_tensor_with_scales_learn():
    """(groups, rows, 2): a weight is scale * (q - 8) + zero, q as the product's kernel has it."""
    model = network("int4 cpu")
    layer = layers(model)[0]
    packed, before = layer.weight.scale_and_zero, dequantised(layer)
    scale, zero = (packed[..., i].t().repeat_interleave(32, 1).clone() for i in (0, 1))
    integers = (before - zero) / scale
    assert torch.equal(integers.round().unique(), torch.arange(-8.0, 8.0))
    optimizer = HybridZOFO(groups_of(model), seed=7)
    optimizer.step(lambda: model(X).square().mean())
    now, shift = (packed[..., i].t().repeat_interleave(32, 1) for i in (0, 1))
    assert not torch.equal(now, scale)
    assert not torch.equal(shift, zero)
    wanted = now * integers.round() + shift
    torch.testing.assert_close(dequantised(layer), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "bnb int8", "torchao int8", "intx int4"])
def test_on_a_gpu(kind):
    """Scales are moved by the numbers of the CPU, and what is evaluated moves with them."""
    model = network(kind).to("cuda")
    optimizer = HybridZOFO(groups_of(model), seed=7, distribution="rademacher")
    start, x, seen = copied(model), X.cuda(), []

    def closure():
        seen.append(copied(model))
        return model(x).square().mean()

    before = model(x)
    optimizer.step(closure)
    for name, scale in along(optimizer.zo_groups(), start, MU).items():
        torch.testing.assert_close(seen[0][name], scale, rtol=0.0, atol=0.0)
    assert not torch.equal(model(x), before)
