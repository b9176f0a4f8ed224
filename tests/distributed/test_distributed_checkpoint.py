"""Checkpoints of torch.distributed: saved by four ranks, gone on from by two, and by one."""

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from launch import case, results_of, run_cases
from sharded import (
    Even,
    batch,
    close,
    fsdp,
    full,
    needs_tensor_parallel,
    optimizer_of,
    over_tensor,
    same,
    toy,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from zofo_optim.rules import Clip

pytestmark = needs_tensor_parallel
CHECKPOINTS = "ZOFO_CHECKPOINTS"
ZO, FO = dict(lr=1e-2, mu=1e-2, seed=9), dict(lr=1e-2)
JOBS = {
    "zeroth order": dict(num_samples=2),
    "low rank": dict(structure="low_rank", distribution="rademacher"),
    "hybrid": dict(fo_optimizer=torch.optim.AdamW),
    "rule": dict(zo_rule=Clip(1e-3)),
}
FLAT = "hybrid"
"""Saved with ``flatten_optimizer_state_dict``."""


def job(name, model):
    """A model that trains by zeroth order, or its head by first order."""
    if name == "hybrid":
        model.head.requires_grad_(True)
    return optimizer_of(model, ZO, FO if name == "hybrid" else None, **JOBS[name])


def steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        optimizer.step(lambda: model(*batch()))


def options_of(name):
    return StateDictOptions(flatten_optimizer_state_dict=name == FLAT)


def state_of(name, model, optimizer):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options_of(name)),
    }


def another(shard=lambda model: model):
    """A model of the same kind with other weights."""
    model = toy(torch.float64, Even)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    return shard(model)


def gone_on(name, folder, model):
    """The weights two steps after a checkpoint, in a new optimizer; and what it is set to."""
    optimizer = job(name, model)
    optimizer.param_groups[0]["mu"] = 0.5
    state = state_of(name, model, optimizer)
    dcp.load(state, checkpoint_id=f"{folder}/{name}")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options_of(name))
    group = optimizer.param_groups[0]
    path = [group[option] for option in ("zo_step", "seed", "mu", "mode")]
    waiting = optimizer.accumulated is not None
    if waiting:
        optimizer.step()
    steps(model, optimizer, 2)
    return path, waiting, full(model)


@case
def saved(rank, size):
    if size < 4:
        return None
    found = {}
    for name in JOBS:
        model = over_tensor(toy(torch.float64, Even))
        optimizer = job(name, model)
        if name == "low rank":  # before the first step: torch makes the state
            empty = state_of(name, model, optimizer)["optimizer"]["param_groups"][0]
            assert empty["zo_step"] == 0
        optimizer.param_groups[0]["mu"] = 2e-2
        steps(model, optimizer, 2)
        if name == "zeroth order":  # within a step
            optimizer.backward(lambda: model(*batch()))  # noqa: B023
        dcp.save(
            state_of(name, model, optimizer), checkpoint_id=f"{os.environ[CHECKPOINTS]}/{name}"
        )
        if name == "zeroth order":
            optimizer.step()
        steps(model, optimizer, 2)
        found[name] = full(model)
    return found


@case
def loaded(rank, size):
    if size > 2:
        return None
    return {name: gone_on(name, os.environ[CHECKPOINTS], another(fsdp)) for name in JOBS}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def launch(ranks, folder, tmp_path_factory):
    env = {CHECKPOINTS: str(folder)}
    return results_of(__file__, ranks, tmp_path_factory.mktemp("ranks"), env=env)


@pytest.fixture(scope="session")
def of_four(folder, tmp_path_factory):
    return launch(4, folder, tmp_path_factory)["saved"]


@pytest.fixture(scope="session")
def of_two(of_four, folder, tmp_path_factory):
    return launch(2, folder, tmp_path_factory)


def check(name, path, waiting, weights, expected):
    assert path == [2, 9, 2e-2, "zo"]
    assert waiting == (name == "zeroth order")
    close(weights, expected)


@pytest.mark.parametrize("name", JOBS)
def test_ranks_agree_on_what_is_saved(of_four, name):
    for found in of_four:
        same(found[name], of_four[0][name])


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_go_on_where_four_ended(of_two, of_four, name):
    for found in of_two["loaded"]:
        check(name, *found[name], of_four[0][name])


@pytest.mark.parametrize("name", JOBS)
def test_one_process_goes_on_where_four_ended(of_four, folder, name):
    check(name, *gone_on(name, folder, another()), of_four[0][name])


if __name__ == "__main__":
    run_cases()
