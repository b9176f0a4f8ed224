"""Scales in optimizers that are copied, and in groups that are added later."""

import copy
import pickle

import pytest
import torch
from quantized_models import NAMES, layers, network, replaced, scales

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
KINDS = pytest.mark.parametrize(
    "kind", ["nf4", "nf4 double", "bnb int8", "torchao int8", "int4 cpu"]
)


def groups_of(model, **options):
    zo = dict(lr=0.1, mu=1e-2)
    return hybrid_param_groups(model, zo=zo, quantized="scales", verbose=False, **options)


def run(model, optimizer, steps=2):
    return [optimizer.step(lambda: model(X).square().mean()).item() for _ in range(steps)]


def check_same(model, other):
    assert all(torch.equal(scale, scales(other)[name]) for name, scale in scales(model).items())


# ---- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_first", [True, False])
@KINDS
def test_a_copy_of_both_trains_the_scales_of_the_copied_model(kind, model_first):
    """bitsandbytes' 4-bit weights copy their scales apart from whatever else holds them."""
    model = network(kind)
    optimizer = HybridZOFO(groups_of(model), seed=3)
    run(model, optimizer, 1)
    if model_first:
        other, again = copy.deepcopy((model, optimizer))
    else:
        again, other = copy.deepcopy((optimizer, model))
    held = {scale.data_ptr() for scale in scales(other).values()}
    assert {p.data_ptr() for g in again.param_groups for p in g["params"]} == held
    assert held.isdisjoint(scale.data_ptr() for scale in scales(model).values())
    assert run(model, optimizer) == run(other, again)
    check_same(model, other)


@KINDS
def test_copied_optimizers_know_scales_that_are_replaced(kind):
    model = network(kind)
    optimizer = HybridZOFO(groups_of(model))
    run(model, optimizer, 1)
    other, again = copy.deepcopy((model, optimizer))
    beside = copy.copy(again)
    replaced(layers(other)[1], kind)
    for one in (again, beside):
        with pytest.raises(RuntimeError, match=rf"has replaced '2\.{NAMES[kind]}'"):
            run(other, one, 1)
    run(model, optimizer, 1)


def test_a_weight_that_is_gone():
    model = network("nf4")
    optimizer = HybridZOFO(groups_of(model))
    del layers(model)[1].weight
    with pytest.raises(RuntimeError, match=r"has replaced '2\.weight\.absmax'"):
        run(model, optimizer, 1)


def test_what_was_replaced_before_is_replaced_in_the_copy():
    model = network("nf4")
    optimizer = HybridZOFO(groups_of(model))
    replaced(layers(model)[1], "nf4")
    other, again = copy.deepcopy((model, optimizer))
    with pytest.raises(RuntimeError, match=r"has replaced '2\.weight\.absmax'"):
        run(other, again, 1)


@KINDS
def test_groups_that_are_copied_with_their_model(kind):
    model = network(kind)
    other, groups = copy.deepcopy((model, groups_of(model)))
    assert run(other, HybridZOFO(groups)) == run(model, HybridZOFO(groups_of(model)))
    check_same(model, other)


def test_a_copy_of_the_optimizer_alone_leaves_the_model_as_it_is():
    model = network("nf4")
    optimizer = HybridZOFO(groups_of(model))
    before = {name: scale.clone() for name, scale in scales(model).items()}
    run(model, copy.deepcopy(optimizer))
    assert all(torch.equal(scale, before[name]) for name, scale in scales(model).items())


@pytest.mark.parametrize("kind", ["nf4", "bnb int8"])  # torchao's modules cannot be pickled
def test_a_pickle_of_both(kind):
    model = network(kind)
    optimizer = HybridZOFO(groups_of(model), seed=3)
    run(model, optimizer, 1)
    again, other = pickle.loads(pickle.dumps((optimizer, model)))
    assert run(model, optimizer) == run(other, again)
    check_same(model, other)


def test_a_pickle_of_the_optimizer_holds_no_module():
    model = network("nf4", sizes=(64, 1024, 64))
    optimizer = HybridZOFO(groups_of(model))
    size = sum(scale.nbytes for scale in scales(model).values())
    assert size < len(pickle.dumps(optimizer)) < 2 * size  # the integers have eight times that


STREAMED = r"perturbation must be 'in_place' where quantisation scales learn, got 'streamed'"


@pytest.mark.parametrize("kind", ["nf4", "bnb int8"])
@pytest.mark.parametrize("plain", [False, True])
def test_groups_that_are_pickled_know_their_scales(kind, plain):
    """Also as a plain list, by what it tells itself."""
    model = network(kind)
    groups = list(groups_of(model)) if plain else groups_of(model)
    other, groups = pickle.loads(pickle.dumps((model, groups)))
    with pytest.raises(ValueError, match=STREAMED):
        HybridZOFO(groups, perturbation="streamed")
    optimizer = HybridZOFO(groups)
    assert run(other, optimizer) == run(model, HybridZOFO(groups_of(model)))
    if not plain:
        replaced(layers(other)[1], kind)
        with pytest.raises(RuntimeError, match=rf"has replaced '2\.{NAMES[kind]}'"):
            run(other, optimizer, 1)


# ---- groups that are added ----------------------------------------------------------------------


def added(kind, **options):
    """An optimizer of the first layer's scales, and the group of the second's."""
    model = network(kind)
    optimizer = HybridZOFO(groups_of(model, include=r"^0\."), seed=3, **options)
    (group,) = groups_of(model, include=r"^2\.")
    return model, optimizer, group


@KINDS
def test_added_groups_learn_as_those_given_at_first(kind):
    model, optimizer, group = added(kind)
    optimizer.add_param_group(group)
    other = network(kind)
    parts = [groups_of(other, include=pattern)[0] for pattern in (r"^0\.", r"^2\.")]
    assert run(model, optimizer) == run(other, HybridZOFO(parts, seed=3))
    check_same(model, other)


@pytest.mark.parametrize("after", [True, False])
@KINDS
def test_scales_of_added_groups_that_are_replaced(kind, after):
    """After they were added, and between making the group and adding it."""
    model, optimizer, group = added(kind)
    run(model, optimizer, 1)
    if after:
        optimizer.add_param_group(group)
    replaced(layers(model)[1], kind)
    if not after:
        optimizer.add_param_group(group)
    with pytest.raises(RuntimeError, match=rf"has replaced '2\.{NAMES[kind]}'"):
        run(model, optimizer, 1)
    optimizer.param_groups.pop()
    run(model, optimizer, 1)  # what does not learn may be replaced


def test_added_scales_move_in_place_only():
    model = network("nf4")
    model.append(torch.nn.LayerNorm(32)).requires_grad_(False)
    optimizer = HybridZOFO(groups_of(model, include=r"^3\."), perturbation="streamed")
    (group,) = groups_of(model, include=r"^2\.")
    with pytest.raises(ValueError, match=r"perturbation must be 'in_place'.*'2\.weight\.absmax'"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    run(model, optimizer, 1)


@pytest.mark.parametrize("copied", ["deep", "shallow", "optimizer first", "pickled"])
def test_added_scales_move_in_place_only_in_copies(copied):
    """Those that do not know the model go by what the group tells."""
    model = network("nf4")
    model.append(torch.nn.LayerNorm(32)).requires_grad_(False)
    optimizer = HybridZOFO(groups_of(model, include=r"^3\."), perturbation="streamed")
    if copied == "deep":
        model, optimizer = copy.deepcopy((model, optimizer))
    elif copied == "shallow":
        optimizer = copy.copy(optimizer)
    elif copied == "optimizer first":
        optimizer, model = copy.deepcopy((optimizer, model))
    else:
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    (group,) = groups_of(model, include=r"^2\.")
    with pytest.raises(ValueError, match=rf"{STREAMED}.*'2\.weight\.absmax'"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    run(model, optimizer, 1)


def test_ordinary_weights_with_a_unit_are_streamed():
    """Nothing is known of the model, and nothing tells of scales."""
    weights = {"a.scale": torch.nn.Parameter(torch.ones(3), False), "b": torch.ones(3)}
    group = dict(params=list(weights.values()), param_names=list(weights), unit=0.5, lr=0.1)
    optimizer = HybridZOFO([group], mode="zo", perturbation="streamed")
    optimizer.step(lambda: sum((w * 2).sum() for w in weights.values()))
    assert optimizer.projected_grads.item() != 0


@KINDS
def test_scales_added_to_a_copy_that_are_replaced(kind):
    model, optimizer, _ = added(kind)
    model, optimizer = copy.deepcopy((model, optimizer))
    (group,) = groups_of(model, include=r"^2\.")
    optimizer.add_param_group(group)
    run(model, optimizer, 1)
    replaced(layers(model)[1], kind)
    with pytest.raises(RuntimeError, match=rf"has replaced '2\.{NAMES[kind]}'"):
        run(model, optimizer, 1)


def test_a_plain_list_whose_scales_were_replaced():
    """Told of the model, an optimizer knows them by their names."""
    model = network("nf4")
    groups = list(groups_of(model))
    replaced(layers(model)[0], "nf4")
    optimizer = HybridZOFO(groups, restore_buffers=model)
    with pytest.raises(RuntimeError, match=r"has replaced '0\.weight\.absmax'"):
        run(model, optimizer, 1)


# ---- groups that are arranged as they were saved ------------------------------------------------


def test_a_journal_says_why_groups_cannot_be_arranged(tmp_path):
    model = network("nf4", sizes=(64, 64, 64))
    for layer, size in zip(layers(model), (8, 1), strict=True):
        layer.weight.quant_state.absmax.mul_(size)
    state = copy.deepcopy(HybridZOFO(groups_of(model)).state_dict())
    layers(model)[1].weight.quant_state.absmax.mul_(64)
    optimizer = HybridZOFO(groups_of(model))
    names = [g["param_names"] for g in optimizer.param_groups]
    assert names != [g["param_names"] for g in state["param_groups"]]
    with Journal(tmp_path / "run.zofo").attach(optimizer):
        with pytest.raises(RuntimeError, match="cannot go from group to group while a journal"):
            optimizer.load_state_dict(state)
        assert [g["param_names"] for g in optimizer.param_groups] == names
        run(model, optimizer, 1)
