"""Several processes train as one does on the same global batch: the same weights in each."""

import copy
import itertools
import math
import pickle

import pytest
import sharded
import torch
import torch.distributed as dist
from launch import case, launched, run_cases
from small_nets import (
    ROWS,
    alone,
    apart,
    batch,
    closure_of,
    network,
    optimizer_of,
    parameters,
    same,
    train,
)
from torch.nn.parallel import DistributedDataParallel

from zofo_optim import HybridZOFO, hybrid_param_groups

results = launched(__file__, 2, 4)

STREAMED = {"perturbation": "streamed"}
LOW_RANK = {**STREAMED, "structure": "low_rank", "rank": 2}
OF_EXAMPLES = {**LOW_RANK, "directions": "per_example"}
DATA: dict[str, dict] = {
    "in place": {},
    "one-sided": {"estimator": "one_sided"},
    "signs": {"distribution": "rademacher", "num_samples": 3},
    "streamed": STREAMED,
    "low rank": LOW_RANK,
    "low rank in place": {"structure": "low_rank"},
    "coupled": {**STREAMED, "coupling": 0.5},
    "normalized": {"zo_rule": "normalized", "num_samples": 2},
    "active": {"active": 0.5},
}
EXAMPLES: dict[str, dict] = {
    "one-sided": {**OF_EXAMPLES, "estimator": "one_sided"},
    "two-sided": OF_EXAMPLES,
    "contiguous": {**OF_EXAMPLES, "example_order": "contiguous"},
    "zscore": {**OF_EXAMPLES, "zo_rule": "zscore"},
}
SAMPLES: dict[str, dict] = {
    "streamed": STREAMED,
    "one-sided": {**STREAMED, "estimator": "one_sided"},
    "low rank": LOW_RANK,
    "coupled": {**LOW_RANK, "coupling": 0.5},
    "clip": {**LOW_RANK, "zo_rule": "clip"},
}


def wrapped(model):
    return DistributedDataParallel(model)


def of_rank(rank, size, options):
    """The rows of the global batch that a process has."""
    if options.get("example_order") == "contiguous":
        return slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    return slice(rank, None, size)


@case
def data(rank, size):
    found = {}
    for name, options in DATA.items():
        for hybrid in (True, False):
            if not hybrid and "coupling" in options:
                continue
            model = network(hybrid=hybrid)
            call = wrapped(model) if hybrid else model
            found[name, hybrid] = train(model, call, of_rank(rank, size, options), **options)
    return found


@case
def examples(rank, size):
    found = {}
    for name, options in EXAMPLES.items():
        model = network()
        found[name] = train(model, wrapped(model), of_rank(rank, size, options), **options)
    return found


@case
def samples(rank, size):
    found = {}
    for name, options in SAMPLES.items():
        model = network()
        options = {**options, "num_samples": 4, "parallel": "samples"}
        found[name] = train(model, wrapped(model), slice(None), **options)
    return found


@case
def views_of_buckets(rank, size):
    """Gradients are where DDP writes those of each backward; a step's accumulate, and are kept."""
    model = network()
    call = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = optimizer_of(model, coupling=0.5, **STREAMED)
    for step in range(4):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        optimizer.backward(closure_of(call, batch(step)[rank::size]))
        where = model[4].weight.grad.data_ptr()
        optimizer.backward(closure_of(call, batch(step + 4)[rank::size]))
        assert step == 0 or model[4].weight.grad.data_ptr() == where  # DDP rebuilds them once
        optimizer.step()
    return parameters(model)


def test_coupled_gradients_in_views_of_buckets(results):
    model = network()
    optimizer = optimizer_of(model, coupling=0.5, **STREAMED)
    for step in range(4):
        optimizer.zero_grad()
        optimizer.backward(closure_of(model, batch(step)))
        optimizer.backward(closure_of(model, batch(step + 4)))
        optimizer.step()
    found = results["views_of_buckets"]
    assert all(same(others, found[0]) for others in found)
    assert apart(found[0], parameters(model)) < 1e-10


CASES = [
    *(("data", (name, True), options) for name, options in DATA.items()),
    *(("data", (name, False), o) for name, o in DATA.items() if "coupling" not in o),
    *(("examples", name, options) for name, options in EXAMPLES.items()),
    *(("samples", name, {**options, "num_samples": 4}) for name, options in SAMPLES.items()),
]


@pytest.mark.parametrize(
    ("kind", "name", "options"), CASES, ids=[f"{kind}-{name}" for kind, name, _ in CASES]
)
def test_as_one_process(results, kind, name, options):
    every = [found[name] for found in results[kind]]
    assert all(same(others, every[0]) for others in every[1:])
    hybrid = name[1] if isinstance(name, tuple) else True
    model = network(hybrid=hybrid)
    before = parameters(model)
    once = train(model, model, slice(None), **options)
    assert apart(every[0], once) < 1e-10
    assert apart(before, once) > 1e-6


# ---- weights of batches -----------------------------------------------------------------------

SHARES = {2: [3, 5], 4: [1, 4, 0, 3]}
"""Rows of the global batch that each rank has."""


def own_rows(rank, size):
    first = sum(SHARES[size][:rank])
    return slice(first, first + SHARES[size][rank])


@case
def weighted(rank, size):
    model = network()
    call = wrapped(model)
    optimizer = optimizer_of(model)
    for step in range(3):
        x = batch(step)[own_rows(rank, size)]
        optimizer.zero_grad()
        # a process without rows takes others', and counts nothing
        optimizer.step(closure_of(call, x if len(x) else batch(9)), weight=len(x))
    return parameters(model)


def test_batches_of_different_size(results):
    model = network()
    once = train(model, model, slice(None), steps=3)
    assert apart(results["weighted"][0], once) < 1e-10
    assert all(same(found, results["weighted"][0]) for found in results["weighted"])


@case
def weighted_means_of_examples(rank, size):
    """The mean of the last process counts three times as much, that of the first nothing."""
    weights = [0, *[1] * (size - 2), 3]
    model = network()
    call = wrapped(model)
    optimizer = optimizer_of(model, **OF_EXAMPLES)
    closure = closure_of(call, batch(0)[rank::size], of_examples=True)
    optimizer.step(closure, weight=weights[rank])
    return parameters(model)


def test_weights_of_means_of_examples(results):
    size = results.size
    model = network()
    optimizer = optimizer_of(model, **OF_EXAMPLES)
    weights = torch.tensor([0.0, *[1.0] * (size - 2), 3.0], dtype=torch.float64)
    factors = (size * weights / weights.sum()).repeat(ROWS // size)
    optimizer.step(lambda: model(batch(0)).square().flatten() * factors)
    assert apart(results["weighted_means_of_examples"][0], parameters(model)) < 1e-10


@case
def weighted_examples(rank, size):
    """Dealt by turns, the last ranks have an example less."""
    model = network()
    call = wrapped(model)
    optimizer = optimizer_of(model, **OF_EXAMPLES)
    for step in range(3):
        x = batch(step)[:7][rank::size]
        optimizer.zero_grad()
        optimizer.step(closure_of(call, x, of_examples=True), weight=len(x))
    return parameters(model)


def test_examples_of_batches_of_different_size(results):
    model = network()
    once = train(model, model, slice(7), steps=3, **OF_EXAMPLES)
    assert apart(results["weighted_examples"][0], once) < 1e-10


@case
def wrong_weights(rank, size):
    model = network()
    for weight in (-1, math.nan, "1", True):
        with pytest.raises((TypeError, ValueError), match="weight must be"):
            optimizer_of(model).step(closure_of(model, batch(0)), weight=weight)
    with pytest.raises(ValueError, match=r"weight must be a finite number >= 0 in every process"):
        optimizer_of(model).step(closure_of(model, batch(0)), weight=0)
    for wrong, match in ((-1, "weight must be a finite"), (None, "another given than rank 0")):
        with pytest.raises((ValueError, RuntimeError), match=match):  # of one process, in all
            optimizer_of(model).step(closure_of(model, batch(0)), weight=1 if rank else wrong)
    call = wrapped(model)

    def own_backward():
        loss = call(batch(0)).square().mean()
        loss.backward()
        return loss

    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match=r"leave backward to the optimizer where weight differs"):
        optimizer.step(own_backward, weight=1 + rank)
    optimizer.zero_grad()
    optimizer.step(own_backward, weight=3)
    for order, match in (("contiguous", "as many losses"), ("interleaved", "dealt by turns")):
        x = batch(0)[: 3 if rank == 0 else 6]
        optimizer = optimizer_of(model, **OF_EXAMPLES, example_order=order)
        with pytest.raises(ValueError, match=match):
            optimizer.step(closure_of(call, x, of_examples=True))
        optimizer.zero_grad()
    x = batch(0)[: 6 if rank == 0 else 5]
    with pytest.raises(ValueError, match=r"weight must be given where processes have batches"):
        optimizer_of(model, **OF_EXAMPLES).step(closure_of(call, x, of_examples=True))


def test_weights_that_cannot_be(results):
    results["wrong_weights"]


# ---- accumulation, skipped steps, loops -------------------------------------------------------


@case
def accumulated(rank, size):
    model = network()
    call = wrapped(model)
    optimizer = optimizer_of(model)
    for step in range(3):
        x = batch(step)[rank::size]
        optimizer.zero_grad()
        with call.no_sync():
            optimizer.backward(lambda: call(batch(step)[rank::size]).square().mean() / 2)  # noqa: B023
        optimizer.backward(lambda: call(x).mean() / 2)  # noqa: B023
        optimizer.step()
    return parameters(model)


def test_accumulation_without_synchronising(results):
    model = network()
    optimizer = optimizer_of(model)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(lambda: model(batch(step)).square().mean() / 2)  # noqa: B023
        optimizer.backward(lambda: model(batch(step)).mean() / 2)  # noqa: B023
        optimizer.step()
    assert apart(results["accumulated"][0], parameters(model)) < 1e-10


@case
def not_finite_somewhere(rank, size):
    model = network()
    call = wrapped(model)
    optimizer = optimizer_of(model)
    before = parameters(model)
    factor = math.nan if rank == size - 1 else 1.0
    optimizer.step(lambda: call(batch(0)).square().mean() * factor)
    kept = apart(parameters(model), before) < 1e-14  # moves round
    optimizer.zero_grad()
    optimizer.step(closure_of(call, batch(1)[rank::size]))
    return kept, optimizer.skipped_steps, parameters(model)


def test_a_loss_that_is_not_finite_in_one_process_is_skipped_in_all(results):
    every = results["not_finite_somewhere"]
    assert [kept for kept, _, _ in every] == [True] * results.size
    assert [skipped for _, skipped, _ in every] == [1] * results.size
    assert all(same(found, every[0][2]) for _, _, found in every)


@case
def displaced_not_finite(rank, size):
    """At one displaced point, in one process."""
    model = network()
    call = wrapped(model)
    optimizer = optimizer_of(model, coupling=0.5, **STREAMED)
    optimizer.step(closure_of(call, batch(0)[rank::size]))  # which has a run of checks
    before, runs = parameters(model), itertools.count()

    def closure():
        bad = next(runs) == 1 and rank == size - 1
        return call(batch(1)[rank::size]).square().mean() * (math.nan if bad else 1.0)

    optimizer.zero_grad()
    optimizer.step(closure)
    found = parameters(model)
    optimizer.zero_grad()
    optimizer.step(closure_of(call, batch(2)[rank::size]))
    return before, found, parameters(model)


def test_a_coupled_loss_that_is_not_finite_in_one_process_is_left_out_in_all(results):
    every = results["displaced_not_finite"]
    for before, found, after in every:
        assert all(p.isfinite().all() for p in after)
        assert same(found, every[0][1])
        assert same(after, every[0][2])
        assert not torch.equal(before[-1], found[-1])  # the clean loss trains the head


@case
def buffers(rank, size):
    """Statistics of batches, beside those of DDP alone; zeroth order stands still."""
    found = []
    for hybrid in (True, False):
        model = network()
        model.insert(4, torch.nn.BatchNorm1d(8, dtype=torch.float64).requires_grad_(False))
        call, trains = wrapped(model), [*model[5].parameters()]
        optimizer = torch.optim.SGD(trains, lr=1e-2, momentum=0.9)
        if hybrid:
            optimizer = optimizer_of(model, zo={"lr": 0.0})
        for step in range(3):
            closure = closure_of(call, batch(step)[rank::size])
            optimizer.zero_grad()
            if not hybrid:
                closure().backward()
            optimizer.step(closure if hybrid else None)
        found.append([b.double() for b in model.buffers()])
    return found


def test_buffers_are_broadcast_as_ddp_does(results):
    for ours, theirs in results["buffers"]:
        assert apart(ours, theirs) < 1e-10


@case
def raised(rank, size):
    model = network(hybrid=False)
    optimizer = optimizer_of(model, nonfinite="raise")
    with pytest.raises(FloatingPointError):
        optimizer.step(lambda: model(batch(0)).mean() * (math.inf if rank == 0 else 1))


def test_raised_in_all(results):
    results["raised"]


@case
def state_goes_on(rank, size):
    """A state dict, a copy and an optimizer that was loaded go on as the first does."""
    model = network(hybrid=False)
    optimizer = optimizer_of(model)
    rows = slice(rank, None, size)
    optimizer.step(closure_of(model, batch(0)[rows]))
    other = network(hybrid=False)
    other.load_state_dict(model.state_dict())
    second = optimizer_of(other, zo={"seed": 3})
    second.load_state_dict(optimizer.state_dict())
    third_model, third = copy.deepcopy((model, optimizer))
    for step in (1, 2):
        optimizer.step(closure_of(model, batch(step)[rows]))
        second.step(closure_of(other, batch(step)[rows]))
        third.step(closure_of(third_model, batch(step)[rows]))
    return parameters(model), parameters(other), parameters(third_model)


def test_state_goes_on(results):
    for first, second, third in results["state_goes_on"]:
        assert same(first, second)
        assert same(first, third)


@case
def asked(rank, size):
    model = network(hybrid=False)
    optimizer = optimizer_of(model, **OF_EXAMPLES, estimator="antithetic")
    places = optimizer.ask(4)
    scores = [0.1 * at.direction * at.side for at in places]
    optimizer.tell(scores)
    optimizer.step()
    return [at.direction for at in places], parameters(model), optimizer.projected_grads


def test_ask_and_tell(results):
    found = results["asked"]
    size = results.size
    assert [directions for directions, _, _ in found] == [
        [rank, rank, rank + size, rank + size] for rank in range(size)
    ]
    model = network(hybrid=False)
    optimizer = optimizer_of(model, **OF_EXAMPLES, estimator="antithetic")
    optimizer.tell([0.1 * at.direction * at.side for at in optimizer.ask(4 * size)])
    optimizer.step()
    for _, weights, slopes in found:
        assert torch.allclose(slopes.double(), optimizer.projected_grads.double())
        assert apart(weights, parameters(model)) < 1e-6


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


# ---- who trains together ----------------------------------------------------------------------


@case
def groups_of_processes(rank, size):
    model = network(hybrid=False)
    own = train(model, model, slice(rank, None, size), steps=2, process_group=alone(rank))
    if size == 2:
        return own, None
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = network(hybrid=False)
    rows = slice(rank % 2, None, 2)
    return own, train(model, model, rows, steps=2, process_group=pairs[rank // 2])


def test_groups_of_processes(results):
    for rank, (own, of_pair) in enumerate(results["groups_of_processes"]):
        model = network(hybrid=False)
        assert same(own, train(model, model, slice(rank, None, results.size), steps=2))
        if of_pair is not None:
            model = network(hybrid=False)
            assert apart(of_pair, train(model, model, slice(None), steps=2)) < 1e-10


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


@case
def first_order_alone(rank, size):
    """No collective of ours, and torch's own steps to the bit."""
    found = []
    for kind in (HybridZOFO, torch.optim.SGD):
        model = network()
        model.requires_grad_(True)
        call = wrapped(model)
        optimizer = kind(model.parameters(), lr=1e-2, momentum=0.9)
        counted = []
        gather, objects = dist.all_gather, dist.all_gather_object
        dist.all_gather = lambda *args, **kw: counted.append(args)  # noqa: B023
        dist.all_gather_object = dist.all_gather
        try:
            for step in range(3):
                optimizer.zero_grad()

                def closure():
                    loss = call(batch(step)[rank::size]).square().mean()  # noqa: B023
                    loss.backward()
                    return loss

                optimizer.step(closure)
        finally:
            dist.all_gather, dist.all_gather_object = gather, objects
        assert not counted
        found.append(parameters(model))
    return found


def test_first_order_alone(results):
    for ours, torchs in results["first_order_alone"]:
        assert same(ours, torchs)


def test_samples_in_place_are_refused():
    model = network(hybrid=False)
    with pytest.raises(ValueError, match=r"perturbation must be 'streamed' where parallel='samp"):
        optimizer_of(model, parallel="samples")
    for name, value in (("parallel", "ranks"), ("example_order", "any"), ("check_ranks_every", -1)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            optimizer_of(model, **{name: value})


if __name__ == "__main__":
    run_cases()
