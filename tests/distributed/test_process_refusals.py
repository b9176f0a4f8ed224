"""What differs between processes, or cannot train in several, is refused in all of them."""

import copy
import pickle

import pytest
import sharded
import torch
import torch.distributed as dist
from launch import case, launched, run_cases
from small_nets import (
    LOW_RANK,
    STREAMED,
    alone,
    apart,
    batch,
    closure_of,
    network,
    optimizer_of,
    train,
    wrapped,
)
from torch.nn.parallel import DistributedDataParallel

from zofo_optim import HybridZOFO, hybrid_param_groups

results = launched(__file__, 2, 4)


# ---- what differs between processes is found --------------------------------------------------


@case
def different(rank, size):
    model = network(hybrid=False)
    step = closure_of(model, batch(0))

    def refused(match, **options):
        with pytest.raises(RuntimeError, match=match):
            optimizer_of(model, **options).step(step)

    last = rank == size - 1
    refused("another seed of zeroth-order group 0", zo={"seed": int(last)})
    refused("another lr of zeroth-order group 0", zo={"lr": 2e-2 if last else 1e-2})
    refused("another num_samples than rank 0: [12] and 1", num_samples=2 if last else 1)
    refused("another check_ranks_every", check_ranks_every=int(last))
    names = {"include": "weight"} if last else {}
    groups = hybrid_param_groups(model, {"lr": 1e-2}, verbose=False, **names)
    with pytest.raises(RuntimeError, match="another names of zeroth-order group 0"):
        HybridZOFO(groups).step(step)
    with torch.no_grad():
        model[2].weight[0, 0] += float(last)
    refused("parameters must be the same in all processes.*: 2.weight")
    model = network()
    optimizer = optimizer_of(model)  # no wrapper: first-order gradients stay their own
    optimizer.step(closure_of(model, batch(0)[rank::size]))
    with pytest.raises(RuntimeError, match=r"4.weight, 4.bias.*wrap the model"):
        optimizer.step(closure_of(model, batch(1)[rank::size]))


def test_differences_are_found_before_they_train(results):
    results["different"]


@case
def differs_later(rank, size):
    model = network(hybrid=False)
    optimizer = optimizer_of(model, check_ranks_every=3)
    found = []
    for step in range(7):
        if step == 4:
            with torch.no_grad():
                model[0].bias[0] += rank
        try:
            optimizer.step(closure_of(model, batch(step)))
        except RuntimeError as error:
            found.append((step, str(error)))
            break
    never = optimizer_of(model, check_ranks_every=0)
    never.step(closure_of(model, batch(0)))
    return found


def test_weights_are_compared_now_and_then(results):
    for ((step, message),) in results["differs_later"]:
        assert step == 6
        assert "rank 1 has others than rank 0: 0.bias" in message


@case
def shards_of_equal_shapes(rank, size):
    """A part of one parameter may have the place and shape that another parameter has."""

    class Wide(sharded.Toy):
        WIDTH, HIDDEN = 8, (8 * size, 8 * size)

    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
    model = sharded.tensor_parallel(sharded.toy(torch.float64, Wide), mesh)
    optimizer = HybridZOFO(hybrid_param_groups(model, {"lr": 1e-2}, verbose=False))
    tokens, labels = torch.arange(8).view(2, 4), torch.tensor([0, 1])
    optimizer.step(lambda: model(tokens, labels))
    local = model.layers[0].up.bias.to_local()
    with torch.no_grad():
        model.norm.weight.add_(rank)
    with pytest.raises(RuntimeError, match=r"rank 1 has others than rank 0: norm.weight\."):
        optimizer.step(lambda: model(tokens, labels))
    return tuple(local.shape)


def test_shards_of_equal_shapes(results):
    assert results["shards_of_equal_shapes"] == [(8,)] * results.size


# ---- what cannot train together ---------------------------------------------------------------


@case
def refusals(rank, size):
    model = network()
    call = wrapped(model)
    with pytest.raises(RuntimeError, match=r"process_group must be that of Distributed.* got 1 pr"):
        train(model, call, slice(None), steps=1, process_group=alone(rank))
    with pytest.raises(ValueError, match=r"num_samples must be a multiple of the . processes"):
        train(model, call, slice(None), steps=1, **STREAMED, parallel="samples", num_samples=3)
    with pytest.raises(RuntimeError, match=r"optimizer_in_backward must be False where several"):
        train(model, call, slice(None), 1, optimizer_in_backward=True, nonfinite="raise")
    for group in (1, "world", dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(ValueError, match="process_group must be None or a group"):
            train(model, call, slice(None), steps=1, process_group=group)
    trainable = network()
    trainable.requires_grad_(True)
    call = wrapped(trainable)
    groups = [
        {"params": [trainable[0].weight], "mode": "zo", "lr": 1e-2},
        {"params": [*trainable[2:].parameters()], "lr": 1e-2},
    ]
    for _ in range(2):  # frozen too late, or not at all
        with pytest.raises(RuntimeError, match=r"requires_grad=False before DistributedDataPara"):
            HybridZOFO(groups).step(closure_of(call, batch(0)))
        trainable[0].weight.requires_grad_(False)


def test_refusals(results):
    results["refusals"]


class Wrapper(torch.nn.Module):
    """Known by the name of its class, as importing the true ones takes seconds."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class DeepSpeedEngine(Wrapper):
    pass


class FullyShardedDataParallel(Wrapper):
    pass


@case
def wrappers(rank, size):
    for kind, instead in ((DeepSpeedEngine, "fully_shard"), (FullyShardedDataParallel, "fully_sh")):
        model = network()
        call = kind(model)
        match = rf"must not be wrapped in {kind.__name__} over several processes.*{instead}"
        for module in (call, torch.nn.ModuleList([call])):
            with pytest.raises(RuntimeError, match=match):
                hybrid_param_groups(module, {"lr": 1e-2}, verbose=False)
        with pytest.raises(RuntimeError, match=match):  # groups were made before
            train(model, call, slice(None), steps=1)
    found = []
    for wrap in (lambda call: call, lambda call: torch.compile(call, backend="eager")):
        model = network()
        found.append(train(model, wrap(wrapped(model)), slice(rank, None, size)))
    model = network()
    own = DistributedDataParallel(model, process_group=alone(rank))
    train(model, own, slice(rank, None, size), process_group=alone(rank))
    model = network()
    call = wrapped(model)
    groups = hybrid_param_groups(call, {"lr": 1e-2}, {"lr": 1e-2}, verbose=False)
    assert groups[0]["param_names"][0] == "module.0.weight"
    return found


def test_wrappers(results):
    for plain, compiled in results["wrappers"]:
        assert apart(plain, compiled) < 1e-12


@case
def copies(rank, size):
    model = network(hybrid=False)
    optimizer = optimizer_of(model, process_group=alone(rank))
    step = closure_of(model, batch(rank))
    optimizer.step(step)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        with pytest.raises(RuntimeError, match=r"process_group must be set again"):
            other.step(step)
        other.process_group = alone(rank)
        other.step(step)


def test_copies_do_not_train_with_all_processes(results):
    results["copies"]


@case
def shards_of_others(rank, size):
    from torch.distributed.fsdp import fully_shard

    model = network(hybrid=False)
    fully_shard(model)
    match = rf"process_group must have all .*'0.weight', got ranks \[{rank}\], which lack"
    with pytest.raises(ValueError, match=match):
        train(model, model, slice(None), steps=1, process_group=alone(rank))
    own = dist.device_mesh.DeviceMesh.from_group(alone(rank), "cpu")
    model = network(hybrid=False)
    fully_shard(model, mesh=own)
    train(model, model, slice(None), steps=1, process_group=alone(rank))


def test_processes_that_share_a_parameter_train_together(results):
    results["shards_of_others"]


@case
def groups_before_shards(rank, size):
    from torch.distributed.fsdp import fully_shard

    for options in ({}, LOW_RANK):
        for early in (True, False):  # the optimizer too, or its groups alone
            model = network(hybrid=False)
            groups = hybrid_param_groups(model, {"lr": 1e-2}, verbose=False)
            optimizer = HybridZOFO(groups, **options) if early else None
            fully_shard(model)
            optimizer = optimizer or HybridZOFO(groups, **options)
            with pytest.raises(ValueError, match=r"'0.weight' must be the model's.*fully_shard fi"):
                optimizer.step(closure_of(model, batch(0)))


def test_groups_that_were_made_before_shards(results):
    results["groups_before_shards"]


def test_samples_in_place_are_refused():
    model = network(hybrid=False)
    with pytest.raises(ValueError, match=r"perturbation must be 'streamed' where parallel='samp"):
        optimizer_of(model, parallel="samples")
    for name, value in (("parallel", "ranks"), ("example_order", "any"), ("check_ranks_every", -1)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            optimizer_of(model, **{name: value})


if __name__ == "__main__":
    run_cases()
