"""Several processes train as one does on the same global batch: the same weights in each."""

import copy

import pytest
import torch
import torch.distributed as dist
from launch import case, launched, run_cases
from small_nets import (
    LOW_RANK,
    OF_EXAMPLES,
    ROWS,
    STREAMED,
    alone,
    apart,
    batch,
    closure_of,
    network,
    optimizer_of,
    parameters,
    same,
    train,
    wrapped,
)
from torch.nn.parallel import DistributedDataParallel

from zofo_optim import HybridZOFO

results = launched(__file__, 2, 4, forked=False)


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


if __name__ == "__main__":
    run_cases()
