"""Groups of quantised models: what learns, what is refused, and how groups come back."""

import copy
import pickle

import pytest
import torch
from quantized_models import NAMES, layers, network, quantised, replaced, scales
from torch import nn

from zofo_optim import HybridZOFO, hybrid_param_groups, load_base_weights, save_base_weights
from zofo_optim.quantized import Scales, named_tensors, unit_of

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
ZO = dict(lr=0.1, mu=1e-2)


def groups_of(model, zo=None, **options):
    chosen = dict(zo=zo or ZO, quantized="scales", verbose=False)
    return hybrid_param_groups(model, **{**chosen, **options})


def mixed():
    """Quantised layers of two sizes, between ordinary frozen weights and a trained head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    with torch.no_grad():
        model[2].weight.mul_(8)
    model = quantised(model, "nf4")
    return nn.Sequential(*model, nn.Linear(64, 2))


def test_groups_by_size(capsys):
    model = mixed()
    *zo, fo = groups_of(model, fo=dict(lr=1e-3), verbose=True)
    assert [g["param_names"] for g in zo] == [
        ["0.bias", "1.weight", "1.bias", "2.bias"],
        ["2.weight.absmax"],
        ["0.weight.absmax"],
    ]
    assert "unit" not in zo[0]
    assert [g["unit"] for g in zo[1:]] == [8 * zo[2]["unit"], zo[2]["unit"]]
    assert fo["param_names"] == ["3.weight", "3.bias"]
    printed = capsys.readouterr().out
    assert "of them quantisation scales 2 tensors, 128;" in printed
    assert "left out (quantised, their scales learn): 2 tensors, 4.1 k" in printed


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (dict(include="absmax"), ["2.weight.absmax", "0.weight.absmax"]),
        (dict(include=r"^0\.weight"), ["0.weight.absmax"]),
        (dict(exclude=["absmax", "bias"]), ["1.weight"]),
        (dict(exclude=r"^2\."), ["0.bias", "1.weight", "1.bias", "0.weight.absmax"]),
    ],
)
def test_patterns_see_the_names_of_scales(choice, names):
    zo = [g for g in groups_of(mixed(), **choice) if g["mode"] == "zo"]
    assert [name for g in zo for name in g["param_names"]] == names


def test_quantised_weights_that_stay(capsys):
    model = mixed()
    zo, _ = hybrid_param_groups(model, zo=ZO, quantized="frozen")
    assert zo["param_names"] == ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert "left out (quantised, frozen): 2 tensors" in capsys.readouterr().out
    before = {name: scale.clone() for name, scale in scales(model).items()}
    HybridZOFO([zo]).step(lambda: model(X).square().mean())
    assert all(torch.equal(scale, before[name]) for name, scale in scales(model).items())


@pytest.mark.parametrize("kind", ["nf4 double", "intx int4"])
def test_scales_that_are_excluded_stay_as_they_are(kind, capsys):
    """Their weights are not said to learn, nor are they expanded."""
    model = network(kind, torch.bfloat16)
    name = f"0.{NAMES[kind]}"
    (group,) = groups_of(model, exclude=name.replace(".", r"\."), verbose=True)
    assert group["param_names"] == [f"2.{NAMES[kind]}"]
    printed = capsys.readouterr().out
    first, second = layers(model)
    for layer, why in ((first, "frozen"), (second, "their scales learn")):
        size = f"{layer.weight.numel() / 1000:.1f} k"
        assert f"left out (quantised, {why}): 1 tensors, {size}" in printed
    assert "scales of 1 weights expanded" in printed
    if kind == "nf4 double":
        assert first.weight.quant_state.nested
        assert not second.weight.quant_state.nested
    else:
        dtypes = [layer.weight.scale.dtype for layer in (first, second)]
        assert dtypes == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("kind", ["nf4", "nf4 double"])
@pytest.mark.parametrize("include", [r"^0\.weight\.absmax", r"^0\.weight$"])
@pytest.mark.parametrize("exclude", [r"^0\.", r"^0\.weight", "absmax"])
def test_included_scales_that_are_excluded(kind, include, exclude, capsys):
    """The same is said and done whether they are floats already or are quantised themselves."""
    model = network(kind).append(nn.LayerNorm(32)).requires_grad_(False)
    groups = groups_of(model, include=[include, r"^[23]\."], exclude=exclude, verbose=True)
    names = [name for group in groups for name in group["param_names"]]
    assert names == ["3.weight", "3.bias"] + ["2.weight.absmax"] * (exclude != "absmax")
    assert "left out (quantised, frozen): " in capsys.readouterr().out
    if kind == "nf4 double":
        assert layers(model)[0].weight.quant_state.nested


class Replaced(nn.Module):
    """As peft's module for ``modules_to_save``."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(64, 64)})


def test_scales_that_no_forward_pass_uses_stay_as_they_are():
    model = network("nf4 double")
    first = layers(model)[0]
    model[0] = Replaced(first)
    groups = groups_of(model)
    assert [g["param_names"] for g in groups if g["mode"] == "zo"] == [["2.weight.absmax"]]
    assert first.weight.quant_state.nested
    with pytest.raises(ValueError, match=r"matches only unused ones such as '0\.original_module"):
        groups_of(model, include=[r"absmax$", "original_module"], exclude="original_module")


def test_scales_of_weights_that_learn_by_gradients_stay_as_they_are():
    model = network("intx int4", torch.bfloat16)
    first, second = layers(model)
    first.weight.requires_grad_(True)
    zo, fo = groups_of(model)
    assert (zo["param_names"], fo["param_names"]) == (["2.weight.scale"], ["0.weight"])
    assert (first.weight.scale.dtype, second.weight.scale.dtype) == (torch.bfloat16, torch.float32)


def test_base_weights_leave_other_scales_as_they_are(tmp_path):
    model = network("nf4 double")
    optimizer = HybridZOFO(groups_of(model, include=r"^2\."))
    run(model, optimizer, 1)
    save_base_weights(optimizer, model, tmp_path)
    load_base_weights(other := network("nf4 double"), tmp_path)
    assert layers(other)[0].weight.quant_state.nested
    assert torch.equal(scales(other)["2.weight.absmax"], scales(model)["2.weight.absmax"])
    assert torch.equal(other(X), model(X))


def test_arguments():
    model = mixed()
    with pytest.raises(ValueError, match=r"quantized must be one of .*'frozen'\), got 'scale'"):
        groups_of(model, quantized="scale")
    with pytest.raises(ValueError, match=r"zo must not set 'unit' where .*got 0.5"):
        groups_of(model, zo=dict(ZO, unit=0.5))
    with pytest.raises(ValueError, match=r"directions must be 'shared' where quantized='scales'"):
        groups_of(model, directions="per_example")


@pytest.mark.parametrize("options", [{}, dict(structure="low_rank")])
def test_scales_move_in_place_only(options):
    model = network("nf4")
    match = r"perturbation must be 'in_place' where quantisation scales learn, got 'streamed'.*'0\."
    with pytest.raises(ValueError, match=match):
        HybridZOFO(groups_of(model), perturbation="streamed", **options)
    groups = groups_of(model)
    with pytest.raises(ValueError, match=match):  # a plain list, whose model is told
        HybridZOFO(list(groups), perturbation="streamed", restore_buffers=model, **options)
    HybridZOFO(groups, **options).step(lambda: model(X).square().mean())


# ---- scales that a module no longer uses --------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "torchao int8", "intx int4"])
def test_scales_that_are_replaced(kind):
    model = network(kind)
    groups = groups_of(model)
    optimizer = HybridZOFO(groups)
    optimizer.step(lambda: model(X).square().mean())
    before = copy.deepcopy(optimizer.state_dict())
    replaced(layers(model)[1], kind)
    learnt = {name: scale.clone() for name, scale in scales(model).items()}
    with pytest.raises(RuntimeError, match=rf"has replaced '2\.{NAMES[kind]}'.*make the groups"):
        optimizer.step(lambda: model(X).square().mean())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert all(torch.equal(scale, learnt[name]) for name, scale in scales(model).items())
    HybridZOFO(groups_of(model)).step(lambda: model(X).square().mean())


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "torchao int8", "intx int4"])
def test_moving_to_where_a_model_is_replaces_nothing(kind, tmp_path):
    model = network(kind)
    optimizer = HybridZOFO(groups_of(model))
    model.to("cpu").float()
    before = {name: scale.clone() for name, scale in scales(model).items()}
    run(model, optimizer, 1)
    assert all(not torch.equal(scale, before[name]) for name, scale in scales(model).items())
    save_base_weights(optimizer, model, tmp_path)
    load_base_weights(other := network(kind), tmp_path)
    assert all(torch.equal(scale, scales(other)[name]) for name, scale in scales(model).items())


def test_tied_scales_learn_once():
    model = network("intx int8", sizes=(64, 64, 64))
    model[2].weight = model[0].weight
    groups = groups_of(model)
    assert [g["param_names"] for g in groups] == [["0.weight.scale"]]
    names = [name for name, _ in named_tensors(model, remove_duplicate=False)]
    assert names == ["0.weight", "2.weight", "0.weight.scale", "2.weight.scale"]
    assert [len(every) for every in Scales(model)] == [2]
    assert [g["param_names"] for g in groups_of(model, include=r"^2\.")] == [["0.weight.scale"]]


@pytest.mark.parametrize("which", [0, 1])
def test_tied_scales_of_which_one_is_replaced(which):
    """The other still uses what learns; whoever was tied to it does not."""
    model = network("intx int8", sizes=(64, 64, 64))
    model[2].weight = model[0].weight
    optimizer = HybridZOFO(groups_of(model))
    layer = layers(model)[which]
    layer.weight = nn.Parameter(copy.deepcopy(layer.weight), requires_grad=False)
    with pytest.raises(RuntimeError, match=rf"has replaced '{2 * which}\.weight\.scale'"):
        optimizer.step(lambda: model(X).square().mean())


# ---- state --------------------------------------------------------------------------------------


def run(model, optimizer, steps):
    return [optimizer.step(lambda: model(X).square().mean()).item() for _ in range(steps)]


def test_state_goes_on_where_sizes_have_changed():
    """Groups of trained scales may be others; the saved state says which they were."""
    model = network("nf4", sizes=(64, 64, 64))
    for layer, size in zip(layers(model), (2.0**-3, 2.0**-5), strict=True):
        absmax = layer.weight.quant_state.absmax
        absmax.mul_(size / absmax.square().mean().sqrt())
    optimizer = HybridZOFO(groups_of(model, zo=dict(lr=0.1, mu=1e-2)), seed=3)
    run(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():  # as if it had learnt that far
        layers(model)[1].weight.quant_state.absmax.mul_(16)
    other = copy.deepcopy(model)
    again = HybridZOFO(groups_of(other, zo=dict(lr=0.1, mu=1e-2)), seed=3)
    order = [["0.weight.absmax"], ["2.weight.absmax"]]
    assert [g.names for g in optimizer.zo_groups()] == order
    assert [g.names for g in again.zo_groups()] != order
    again.load_state_dict(state)
    assert [g.names for g in again.zo_groups()] == order
    assert [g.unit for g in again.zo_groups()] == [2.0**-3, 2.0**-5]
    assert run(model, optimizer, 3) == run(other, again, 3)
    assert all(torch.equal(scale, scales(other)[name]) for name, scale in scales(model).items())


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "intx int4"])
def test_models_and_optimizers_that_are_copied(kind):
    model = network(kind)
    optimizer = HybridZOFO(groups_of(model), seed=3)
    run(model, optimizer, 1)
    other, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    again = HybridZOFO(groups_of(other), seed=3)
    again.load_state_dict(state)
    unpickled = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
    assert unpickled.zo_groups()[0].unit == optimizer.zo_groups()[0].unit
    assert run(model, optimizer, 2) == run(other, again, 2)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.09, 3e-8, float("inf")])
def test_units(value):
    expected = {0.0: 1.0, 1.0: 1.0, 0.09: 2.0**-3, 3e-8: 2.0**-25, float("inf"): 1.0}[value]
    assert unit_of(torch.full((3, 2), value)) == expected
    assert unit_of(torch.empty(0)) == 1.0


def test_patterns_see_the_names_of_the_weights_that_scales_are_of():
    model = nn.Sequential(
        *quantised(nn.Sequential(nn.Linear(64, 64)), "bnb int8"), nn.LayerNorm(64)
    ).requires_grad_(False)
    assert [n for g in groups_of(model) for n in g["param_names"]][-1] == "0.SCB"
    without = groups_of(model, exclude=r"^0\.weight$")
    assert "0.SCB" not in [n for g in without for n in g["param_names"]]
    alone = groups_of(model, include=r"^0\.weight$")
    assert [n for g in alone for n in g["param_names"]] == ["0.SCB"]


def test_what_streams_cannot_measure_scales():
    from zofo_optim.smoothness import along_directions

    model = network("nf4")
    optimizer = HybridZOFO(groups_of(model))
    with pytest.raises(ValueError, match="groups without a unit"):
        along_directions(optimizer, lambda: model(X).square().mean())
