"""perturbation="streamed" where layers compute with DTensors: tensor parallelism, also under FSDP2.

Products are summed in parts, so that losses are those of one process up to rounding. What weights
become is the same to the bit, given the coefficients.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from launch import case, launched, run_cases
from sharded import needs_tensor_parallel, parallelized
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
)

from zofo_optim import HybridZOFO, hybrid_param_groups

pytestmark = needs_tensor_parallel
results = launched(__file__, 4)
MESHES = ((1, 4), (2, 2))
"""Processes that share shards by FSDP2, and those that share products."""

LOW_RANK = dict(structure="low_rank", rank=2)


class Block(nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.adapter = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)) if adapter else None

    def forward(self, x):
        y = self.norm(x)
        z = self.down(torch.tanh(self.up(y)))
        return x + z + (0 if self.adapter is None else self.adapter(y))


class Model(nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.blocks = nn.ModuleList([Block(adapter), Block(adapter)])
        self.head = nn.Linear(8, 12, bias=False)

    def forward(self, x):
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def made(adapter=False, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Model(adapter).to(dtype).requires_grad_(False)
    for block in model.blocks:
        if adapter:
            block.adapter.requires_grad_(True)
    return model


def by_layers(model, mesh):
    """Products alone, as beside an adapter."""
    for block in model.blocks:
        plan = dict(up=ColwiseParallel(), down=RowwiseParallel())
        parallelized(block, mesh, plan)


def by_sequence(model, mesh):
    """All of the model; between products each process has a part of the sequence."""
    rows, whole = Shard(1), Replicate()
    for block in model.blocks:
        plan = dict(
            norm=SequenceParallel(),
            up=ColwiseParallel(input_layouts=rows),
            down=RowwiseParallel(output_layouts=rows),
        )
        parallelized(block, mesh, plan)
    plan = dict(
        embedding=RowwiseParallel(input_layouts=whole, output_layouts=rows),
        norm=SequenceParallel(),
        head=ColwiseParallel(input_layouts=rows, output_layouts=whole),
    )
    parallelized(model, mesh, plan)


def parallel(model, way, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    way(model, mesh["tensor"])
    if shape[0] > 1:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    return model


def optimizer_of(model, fo=None, **options):
    zo = dict(lr=0.03, mu=1e-2, weight_decay=0.1)
    groups = hybrid_param_groups(model, zo=zo, fo=fo, verbose=False)
    return HybridZOFO(groups, **{"perturbation": "streamed", "seed": 7, **options})


def loss_of(model):
    x = torch.randint(12, (2, 8), generator=torch.Generator().manual_seed(1))
    return F.cross_entropy(model(x).flatten(0, 1), x.roll(-1, 1).flatten())


def trained(model, steps=3, **options):
    """The losses of some steps, and the weights then, whole."""
    if any(p.requires_grad for p in model.parameters()):
        options["fo"] = dict(lr=0.1, momentum=0.9)
    optimizer, losses = optimizer_of(model, **options), []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(optimizer.step(lambda: loss_of(model)).detach())
    return torch.stack(losses), whole(model)


def whole(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


RUNS = {
    "full": (by_sequence, dict()),
    "rademacher": (by_sequence, dict(distribution="rademacher", estimator="one_sided")),
    "low_rank": (by_sequence, LOW_RANK),
    "hybrid": (by_layers, dict(LOW_RANK, adapter=True)),
    "coupled": (by_layers, dict(adapter=True, coupling=0.5)),
}


@functools.cache
def run_here(name):
    _, options = RUNS[name]
    options = dict(options)
    return trained(made(options.pop("adapter", False)), **options)


@case
def runs(rank, size):
    found = {}
    for name, (way, options) in RUNS.items():
        for shape in MESHES:
            own = dict(options)
            model = made(own.pop("adapter", False))
            found[name, shape] = trained(parallel(model, way, shape), **own)
    return found


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("run", RUNS)
def test_runs_are_those_of_one_process(results, run, shape):
    losses, weights = run_here(run)
    for of_rank in results["runs"]:
        found_losses, found = of_rank[run, shape]
        torch.testing.assert_close(found_losses, losses, rtol=1e-10, atol=1e-10)
        for name, expected in weights.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-10)


SAME = dict(full={}, low_rank=LOW_RANK)


@case
def in_place_too(rank, size):
    """Of the first step, by either perturbation."""
    return {
        (name, shape, perturbation): trained(
            parallel(made(dtype=torch.float32), by_sequence, shape),
            steps=1,
            perturbation=perturbation,
            estimator="one_sided",
            **options,
        )
        for name, options in SAME.items()
        for shape in MESHES
        for perturbation in ("streamed", "in_place")
    }


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("run", SAME)
def test_copies_are_the_weights_that_in_place_makes(results, run, shape):
    every = [of_rank[run, shape, "streamed"] for of_rank in results["in_place_too"]]
    for of_rank, (losses, weights) in zip(results["in_place_too"], every, strict=True):
        assert torch.equal(losses, of_rank[run, shape, "in_place"][0])
        for name, weight in weights.items():
            assert torch.equal(weight, every[0][1][name])


@case
def refused(rank, size):
    found = []
    for options in (
        dict(structure="low_rank", directions="per_example"),
        dict(parallel="samples", num_samples=size),
    ):
        optimizer = optimizer_of(parallel(made(), by_sequence, (1, size)), **options)
        with pytest.raises(ValueError, match="where layers compute with DTensors") as error:
            optimizer.step(lambda: 0.0)
        found.append(str(error.value))
    return found


def test_what_processes_must_displace_alike_is_not_displaced_otherwise(results):
    for examples, samples in results["refused"]:
        assert examples.startswith("directions must be 'shared' where layers compute with DTensors")
        assert samples.startswith("parallel must be 'data' where layers compute with DTensors")


if __name__ == "__main__":
    run_cases()
