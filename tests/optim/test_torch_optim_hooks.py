"""Hooks of steps and of state dicts, as torch tests them, in every mode."""

import copy
from collections import OrderedDict

import pytest
import torch
from conftest import each_of
from frozen_base import MODES, Model, equal, make, train
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from zofo_optim import HybridZOFO

mode = each_of(MODES)


def test_step_hooks_fire_once_a_step_and_in_order(mode):
    model, calls = Model(), []
    optimizer = make(model, mode)

    def note(name):
        return lambda opt, args, kwargs: calls.append((name, opt is optimizer, args, kwargs))

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        for _ in range(2):
            optimizer.step(model)
        names = ["global pre", "pre", "post", "global post"]
        assert [name for name, *_ in calls] == 2 * names
        assert all(own for _, own, *_ in calls)
        assert all(args[1:] == (model,) and kwargs == {} for *_, args, kwargs in calls)
        calls.clear()
        optimizer.backward(model)
        assert calls == []
        optimizer.step()
        assert [name for name, *_ in calls] == names
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    optimizer.step(model)
    assert calls == []


def test_step_hooks_see_the_weights_and_may_replace_the_closure(mode):
    model, seen = Model(), []
    optimizer = make(model, mode, momentum=0.9)
    start = [p.detach().clone() for p in model.parameters()]

    def pre(opt, args, kwargs):
        seen.append(equal(model.parameters(), start))
        return (args[0], lambda: model() * 2), kwargs

    def post(opt, args, kwargs):
        seen.append(equal(model.parameters(), start))

    optimizer.register_step_pre_hook(pre)
    optimizer.register_step_post_hook(post)
    doubled = optimizer.step(model).item()
    assert seen == [True, False]
    assert doubled == pytest.approx(2 * Model()().item(), rel=1e-3)
    optimizer.register_step_pre_hook(lambda *_: 1)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step(model)


def test_hooks_of_other_optimizers_are_not_ours(mode):
    """The inner first-order optimizer is no second optimizer to a global hook."""
    model, seen = Model(), []
    optimizer = make(model, mode, momentum=0.9)
    handle = register_optimizer_step_pre_hook(lambda opt, *_: seen.append(type(opt)))
    try:
        optimizer.step(model)
        sgd = torch.optim.SGD([Parameter(torch.ones(1))])
        sgd.step()
    finally:
        handle.remove()
    assert seen == [HybridZOFO, torch.optim.SGD]


@pytest.mark.parametrize("prepend", [False, True])
def test_state_dict_hooks(mode, prepend):
    optimizer, calls = make(Model(), mode, lr=0.25), []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("first"))
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("second"), prepend=prepend)

    def in_place(opt, state):
        calls.append("in place")
        state["param_groups"][0]["lr"] = 0.5

    def replace(opt, state):
        calls.append("replace")
        return {**state, "extra": state["param_groups"][0]["lr"]}

    handle = optimizer.register_state_dict_post_hook(in_place)
    optimizer.register_state_dict_post_hook(replace, prepend=prepend)
    state = optimizer.state_dict()
    before, after = ["first", "second"], ["in place", "replace"]
    assert calls == (before[::-1] + after[::-1] if prepend else before + after)
    assert state["extra"] == (0.25 if prepend else 0.5)
    assert state["param_groups"][0]["lr"] == 0.5
    assert optimizer.param_groups[0]["lr"] == 0.25
    handle.remove()
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.25


@pytest.mark.parametrize("prepend", [False, True])
def test_load_state_dict_hooks(mode, prepend):
    model = Model()
    optimizer, calls = make(model, mode, lr=0.25), []
    state = optimizer.state_dict()

    def fixed(lr):
        def hook(opt, state_dict):
            calls.append(lr)
            state_dict["param_groups"] = [{**g, "lr": lr} for g in state_dict["param_groups"]]
            return state_dict

        return hook

    optimizer.register_load_state_dict_pre_hook(fixed(0.5))
    second = optimizer.register_load_state_dict_pre_hook(fixed(1e-3), prepend=prepend)
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("post"))
    optimizer.register_load_state_dict_post_hook(
        lambda opt: calls.append(opt.param_groups[0]["lr"]), prepend=prepend
    )
    optimizer.load_state_dict(state)
    if prepend:
        assert calls == [1e-3, 0.5, 0.5, "post"]
    else:
        assert calls == [0.5, 1e-3, "post", 1e-3]
    assert state["param_groups"][0]["lr"] == 0.25
    second.remove()
    calls.clear()
    optimizer.load_state_dict(state)
    assert calls[0] == 0.5
    assert 1e-3 not in calls
    train(model, optimizer, 1)


def test_hooks_by_name_can_adapt_another_models_state():
    """The use that torch documents for the pre hook, with a ZO group."""
    model, other = Model(), Model()
    source, target = make(model, "hybrid", named=True), make(other, "hybrid", named=True)
    train(model, source, 2)

    def rename(optimizer, state):
        groups = [OrderedDict(group) for group in state["param_groups"]]
        for ours, theirs in zip(optimizer.param_groups, groups, strict=True):
            assert ours["param_names"] == [n.removeprefix("old.") for n in theirs["param_names"]]
            theirs["param_names"] = list(ours["param_names"])
        return {**state, "param_groups": groups}

    target.register_load_state_dict_pre_hook(rename)
    state = copy.deepcopy(source.state_dict())
    for group in state["param_groups"]:
        group["param_names"] = [f"old.{name}" for name in group["param_names"]]
    target.load_state_dict(state)
    other.load_state_dict(model.state_dict())
    assert equal(train(model, source, 2), train(other, target, 2))
