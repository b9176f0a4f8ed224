"""Moving tensors between groups of an optimizer that is in use."""

import copy
import dataclasses

import pytest
import torch
from partitioned import mlp

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, load_hybrid, save_hybrid
from zofo_optim.partition import importance_partition

ZO, FO = dict(lr=1e-3, mu=1e-3), dict(lr=1e-2)


def with_modes(partition, first_order):
    """The same, with these tensors first-order and the others zeroth-order."""
    rows = tuple(
        row.__class__(**{**vars(row), "mode": "fo" if row.name in first_order else "zo"})
        for row in partition.rows
    )
    return partition.__class__(**{**vars(partition), "rows": rows})


def with_frozen(partition, *names):
    rows = tuple(
        dataclasses.replace(row, mode="frozen", why="wanted") if row.name in names else row
        for row in partition.rows
    )
    return dataclasses.replace(partition, rows=rows)


def started(first_order=("6.weight", "6.bias", "4.weight"), cls=torch.optim.AdamW, **options):
    model, closure = mlp()
    partition = importance_partition(model, closure, verbose=False)[1]
    partition = with_modes(partition, first_order)
    groups = partition.groups(model, ZO, FO, verbose=False)
    optimizer = HybridZOFO(groups, fo_optimizer=cls, **options)
    return model, closure, partition, optimizer


def steps(optimizer, closure, count=2):
    for _ in range(count):
        optimizer.zero_grad()
        optimizer.step(closure)
    optimizer.zero_grad()


def members(optimizer):
    return {group["mode"]: group["param_names"] for group in optimizer.param_groups}


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
def test_state_stays_where_a_tensor_stays_and_goes_where_it_goes(cls, perturbation):
    options = dict(momentum=0.9) if cls is torch.optim.SGD else {}
    model, closure, partition, optimizer = started(cls=cls, perturbation=perturbation, **options)
    steps(optimizer, closure)
    tensors = dict(model.named_parameters())
    kept = copy.deepcopy(optimizer.state[tensors["6.weight"]])
    dictionaries = [id(group) for group in optimizer.param_groups]
    contents = {name: p.detach().clone() for name, p in tensors.items()}

    with_modes(partition, ["6.weight", "2.weight"]).apply(optimizer)
    assert members(optimizer)["fo"] == ["2.weight", "6.weight"]
    assert set(members(optimizer)["zo"]) == set(tensors) - {"2.weight", "6.weight"}
    for group in optimizer.param_groups:
        assert [id(tensors[n]) for n in group["param_names"]] == [id(p) for p in group["params"]]
    assert dictionaries == [id(group) for group in optimizer.param_groups]
    assert all(torch.equal(p, contents[name]) for name, p in tensors.items())
    assert tensors["4.weight"] not in optimizer.state
    assert tensors["4.weight"].grad is None
    for name, value in optimizer.state[tensors["6.weight"]].items():
        assert torch.equal(value, kept[name])

    steps(optimizer, closure)
    assert all(not torch.equal(p, contents[name]) for name, p in tensors.items())
    assert set(map(id, optimizer.state)) == {id(tensors[n]) for n in ("6.weight", "2.weight")}


def test_as_if_it_had_been_made_that_way():
    """A fresh optimizer with the new groups, and the same state, takes the same steps."""
    model, closure, partition, optimizer = started(estimator="one_sided", seed=3)
    steps(optimizer, closure)
    after = with_modes(partition, ["6.weight", "0.bias"])
    after.apply(optimizer)

    other, other_closure, _, _ = started()
    other.load_state_dict(model.state_dict())
    fresh = HybridZOFO(
        after.groups(other, ZO, FO, verbose=False),
        fo_optimizer=torch.optim.AdamW,
        estimator="one_sided",
        seed=3,
    )
    assert members(fresh) == members(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    fresh.load_state_dict(state)
    steps(optimizer, closure)
    steps(fresh, other_closure)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedulers_go_on():
    _, closure, partition, optimizer = started()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    steps(optimizer, closure, 1)
    with_modes(partition, ["0.weight"]).apply(optimizer)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [ZO["lr"] / 2, FO["lr"] / 2]
    steps(optimizer, closure, 1)


def test_groups_may_become_empty_and_full_again():
    model, closure, partition, optimizer = started()
    names = [name for name, _ in model.named_parameters()]
    for first_order in ([], names, ["4.bias"]):
        with_modes(partition, first_order).apply(optimizer)
        assert len(members(optimizer)["fo"]) == len(first_order)
        steps(optimizer, closure)
        optimizer.load_state_dict(optimizer.state_dict())


def test_a_journal_refuses(tmp_path):
    _, closure, partition, optimizer = started()
    journal = Journal(tmp_path / "run.zofo").attach(optimizer)
    steps(optimizer, closure)
    before = members(optimizer)
    other = with_modes(partition, ["0.weight"])
    with pytest.raises(RuntimeError, match=r"while a journal is attached.*close it, and begin"):
        other.apply(optimizer)
    assert members(optimizer) == before
    journal.close()
    other.apply(optimizer)
    with Journal(tmp_path / "on.zofo").attach(optimizer):
        steps(optimizer, closure)


def test_an_estimate_that_waits_is_refused():
    _, closure, partition, optimizer = started()
    optimizer.backward(closure)
    other = with_modes(partition, ["0.weight"])
    with pytest.raises(RuntimeError, match=r"waits for its step.*call step\(\) or zero_grad"):
        other.apply(optimizer)
    optimizer.zero_grad()
    other.apply(optimizer)

    def inside():
        other.apply(optimizer)
        return closure()

    with pytest.raises(RuntimeError, match=r"inside a closure"):
        optimizer.step(inside)


def test_several_groups_of_a_mode_need_a_place():
    model, closure, partition, _ = started()
    tensors = dict(model.named_parameters())

    def group(names, **options):
        return dict(params=[tensors[n] for n in names], param_names=list(names), **options)

    rest = [name for name in tensors if not name.startswith("6")]
    optimizer = HybridZOFO(
        [
            group(["6.weight"], mode="fo", lr=0.1, weight_decay=0.1),
            group(["6.bias"], mode="fo", lr=0.1),
            group(rest, mode="zo", lr=1e-3),
        ]
    )
    other = with_modes(partition, ["6.weight", "6.bias", "0.bias"])
    with pytest.raises(ValueError, match=r"place must say which group takes '0.bias'.*2 groups"):
        other.apply(optimizer)
    with pytest.raises(ValueError, match=r"one of \[0, 1\], got 2 for '0.bias'"):
        other.apply(optimizer, place=lambda name, p, mode: 2)
    other.apply(optimizer, place=lambda name, p, mode: 1 if p.dim() == 1 else 0)
    assert optimizer.param_groups[1]["param_names"] == ["0.bias", "6.bias"]
    steps(optimizer, closure)


def test_tensors_that_were_in_no_group():
    model, closure = mlp()
    tensors = dict(model.named_parameters())
    groups, partition = importance_partition(
        model, closure, ZO, FO, exclude=r"0\.", budget=0.3, verbose=False
    )
    optimizer = HybridZOFO(groups)
    other = with_modes(partition, ["0.weight", "6.weight"])
    with pytest.raises(ValueError, match=r"model must be given.*got None, and '0.weight'"):
        other.apply(optimizer)
    other.apply(optimizer, model)
    assert members(optimizer)["fo"] == ["0.weight", "6.weight"]
    partition.apply(optimizer)
    assert not tensors["0.weight"].requires_grad


def test_refusals():
    model, _, partition, _ = started()
    with pytest.raises(TypeError, match=r"optimizer must be a HybridZOFO.*got SGD"):
        partition.apply(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"groups with param_names.*got none in group 0"):
        partition.apply(HybridZOFO(model.parameters(), lr=0.1))
    model.requires_grad_(True)
    only = HybridZOFO(hybrid_param_groups(model, verbose=False), lr=0.1)
    with pytest.raises(ValueError, match=r"not just one has mode='zo'.* 0 groups have it"):
        partition.apply(only)


@pytest.mark.parametrize("in_backward", [False, True])
def test_what_becomes_frozen_is_kept_without_a_gradient(in_backward, tmp_path):
    options = dict(optimizer_in_backward=True, nonfinite="raise") if in_backward else {}
    model, closure, partition, optimizer = started(estimator="one_sided", **options)
    steps(optimizer, closure)
    optimizer.step(closure)
    tensors = dict(model.named_parameters())
    frozen = ("6.weight", "0.weight")  # of first, and of zeroth order
    state = copy.deepcopy(optimizer.state[tensors["6.weight"]])
    later = with_frozen(with_modes(partition, ["6.bias", "4.weight"]), *frozen)
    later.apply(optimizer)
    assert set(members(optimizer)["fo"]) == {"6.bias", "4.weight", *frozen}
    assert all(not tensors[n].requires_grad and tensors[n].grad is None for n in frozen)
    before = {name: p.detach().clone() for name, p in tensors.items()}
    optimizer.zero_grad()
    steps(optimizer, closure)
    moved = {name for name, p in tensors.items() if not torch.equal(p, before[name])}
    assert moved == set(tensors) - set(frozen)
    assert all(
        torch.equal(value, state[k]) for k, value in optimizer.state[tensors["6.weight"]].items()
    )

    save_hybrid(model, optimizer, tmp_path)
    base, _ = mlp()
    loaded, saved = load_hybrid(tmp_path, base)
    assert all(map(torch.equal, model.parameters(), loaded.parameters()))
    groups = partition.groups(loaded, ZO, FO, verbose=False)
    again = HybridZOFO(groups, fo_optimizer=torch.optim.AdamW, estimator="one_sided", **options)
    later.apply(again)
    again.load_state_dict(saved)
    assert members(again) == members(optimizer)

    with_modes(partition, ["6.weight"]).apply(optimizer)
    assert tensors["6.weight"].requires_grad
    assert members(optimizer)["fo"] == ["6.weight"]
    assert "0.weight" in members(optimizer)["zo"]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_a_class_that_does_not_take_a_tensor_changes_nothing():
    model, closure, partition, optimizer = started(["6.weight"], cls=torch.optim.Muon)
    optimizer.step(closure)
    before = members(optimizer)
    gradient, state = model[6].weight.grad.clone(), dict(optimizer.state[model[6].weight])
    with pytest.raises(ValueError, match="Muon only supports 2D"):
        with_modes(partition, ["4.weight", "4.bias"]).apply(optimizer)
    assert members(optimizer) == before
    assert torch.equal(model[6].weight.grad, gradient)
    assert dict(optimizer.state[model[6].weight]) == state
    steps(optimizer, closure)
    with_modes(partition, ["4.weight"]).apply(optimizer)
    steps(optimizer, closure)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model, closure = mlp()
    groups = importance_partition(model, closure, ZO, FO, exclude=r"^0\.", verbose=False)[0]
    optimizer = HybridZOFO(groups)
    before = members(optimizer)
    whole = importance_partition(model, closure, budget=0.3, verbose=False)[1]
    with pytest.raises(ValueError, match=r"model must be given.*in no group.*'0\.\w+' is one"):
        whole.apply(optimizer)
    with pytest.raises(ValueError, match=r"model must be the one.*lacks '2.weight'"):
        whole.apply(optimizer, mlp()[0])
    wide, wide_closure = mlp(width=9)
    wider = importance_partition(wide, wide_closure, exclude=r"^0\.", verbose=False)[1]
    for given in (None, model):
        with pytest.raises(ValueError, match=r"partition's shapes, got \(6,\) for '6.bias'"):
            wider.apply(optimizer, given)
    small, small_closure = mlp(depth=3)
    less = importance_partition(small, small_closure, exclude=r"^0\.", verbose=False)[1]
    with pytest.raises(ValueError, match=r"first-order tensors that the partition knows.*'6.wei"):
        less.apply(optimizer)
    with pytest.raises(ValueError, match=r"model must have the tensors.*trains .*beside"):
        less.apply(optimizer, model)
    assert members(optimizer) == before
    whole.apply(optimizer, model)
    assert sum(map(len, members(optimizer).values())) == 8


@pytest.mark.parametrize("first_order", [[], "all"])
def test_the_state_of_emptied_groups_is_loaded(first_order):
    model, closure, partition, optimizer = started()
    steps(optimizer, closure)
    names = [name for name, _ in model.named_parameters()]
    later = with_modes(partition, names if first_order else [])
    later.apply(optimizer)
    steps(optimizer, closure)
    saved = copy.deepcopy(optimizer.state_dict())
    other, other_closure = mlp()
    other.load_state_dict(model.state_dict())
    groups = later.groups(other, ZO, FO, verbose=False)
    assert len(groups) == 1
    fresh = HybridZOFO(groups, fo_optimizer=torch.optim.AdamW)
    wrong = {
        **saved,
        "param_groups": [dict(g, params=g["params"][:-1]) for g in saved["param_groups"]],
    }
    with pytest.raises(ValueError, match="size of optimizer's group"):
        fresh.load_state_dict(wrong)
    assert len(fresh.param_groups) == 1
    fresh.load_state_dict(saved)
    assert members(fresh) == members(optimizer)
    for one, its_closure in ((optimizer, closure), (fresh, other_closure)):
        steps(one, its_closure)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    partition.apply(fresh)
    steps(fresh, other_closure)


def test_candidates_are_remembered_by_what_was_applied():
    model, closure = mlp()
    model.requires_grad_(False)
    groups, partition = importance_partition(model, closure, ZO, FO, budget=0.3, verbose=False)
    optimizer = HybridZOFO(groups)
    with_modes(partition, ["0.weight"]).apply(optimizer)
    again = importance_partition(model, closure, budget=1.0, verbose=False)[1]
    assert len(again.first_order) == 8
