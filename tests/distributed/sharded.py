"""Small models, sharded as torch does it, and runs of them that any number of ranks can make."""

import math
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from experiments.measure import growth
from zofo_optim import HybridZOFO, hybrid_param_groups

TORCH_26 = torch.__version__.startswith("2.6.")
needs_tensor_parallel = pytest.mark.skipif(
    TORCH_26,
    reason="torch 2.6: embeddings by rows fail in the second dtype of a process, and FSDP2 shards "
    "over tensor parallelism evenly or not at all",
)
needs_fsdp_backward = pytest.mark.skipif(
    TORCH_26,
    reason="torch 2.6: FSDP2 on the CPU has no backward through weights that it gathers anew",
)
needs_reset = pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"),
    reason="this torch cannot leave a forward pass that raised",
)


class Toy(nn.Module):
    """Layers of sizes that no number of ranks divides, and parameters of the root itself."""

    WIDTH, HIDDEN = 7, (9, 5)

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, self.WIDTH)
        self.layers = nn.ModuleList([Layer(self.WIDTH, hidden) for hidden in self.HIDDEN])
        self.norm = nn.LayerNorm(self.WIDTH)
        self.head = nn.Linear(self.WIDTH, 3)

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).mean(1), labels)


class Even(Toy):
    """Of sizes that four ranks divide, as layers of tensor parallelism need them."""

    WIDTH, HIDDEN = 8, (12, 8)


class Layer(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def toy(dtype=torch.float32, kind=Toy):
    """The same weights on every rank, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return kind().to(dtype).requires_grad_(False)


def batch():
    """The same on every rank."""
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(11, (4, 6), generator=generator)
    return tokens, torch.randint(3, (4,), generator=generator)


def fsdp(model, **options):
    """Each layer by itself, and the root for the rest, as torch's tutorials do."""
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def tensor_parallel(model, mesh):
    """Layers, embedding and head over the ranks of a mesh; norms are whole on each."""
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "layers.*.up": ColwiseParallel(),
        "layers.*.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelized(model, mesh, plan)


def parallelized(model, mesh, plan):
    """What is frozen stays so: torch 2.6 makes parameters that require gradients."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    parallelize_module(model, mesh, plan)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    return model


def over_tensor(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    return fsdp(model, mesh=mesh["data"])


def by_columns(parameter):
    return Shard(1) if parameter.dim() > 1 and parameter.shape[1] % 4 == 0 else None


def hybrid_mesh():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def train(model, steps=3, zo=None, fo=None, optimizer=None, **settings):
    """Steps of zeroth order on one batch. Returns the losses that were found.

    Ranks that all have the batch find what one process finds, to the bit: in float64 the mean of
    two or four losses that are equal is that loss.
    """
    if optimizer is None:
        optimizer = optimizer_of(model, zo, fo, **settings)
    inputs = batch()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(float(optimizer.step(lambda: model(*inputs).double())))
    return losses


def optimizer_of(model, zo=None, fo=None, **settings):
    groups = hybrid_param_groups(model, zo or dict(lr=1e-2, mu=1e-2), fo, verbose=False)
    return HybridZOFO(groups, **{"seed": 3, **settings})


def evaluated(model):
    """The loss of an evaluation outside of steps."""
    with torch.no_grad():
        return float(model(*batch()))


def full(model):
    """All weights, whole, as plain tensors."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def recorded(model, optimizer):
    """A closure whose losses depend on the point alone: coefficients are the same anywhere."""
    inputs = batch()

    def closure():
        model(*inputs)
        (group,) = [g for g in optimizer.param_groups if g["mode"] == "zo"]
        sample, scales = optimizer.moves[-1] if optimizer.moves else (0, (0.0,))
        sign = (scales[0] > 0) - (scales[0] < 0)
        return math.sin(1 + 7 * group["zo_step"] + 3 * sample + 0.05 * sign)

    return closure


def replayed(model, steps=2, **settings):
    """The weights after steps by recorded coefficients, whole."""
    zo = dict(lr=1e-2, mu=1e-2, weight_decay=0.1)
    optimizer = optimizer_of(model, zo, **settings)
    closure = recorded(model, optimizer)
    for _ in range(steps):
        optimizer.step(closure)
    return full(model)


VARIANTS = {
    "full": dict(num_samples=2),
    "full, signs": dict(distribution="rademacher", estimator="one_sided"),
    "low rank": dict(structure="low_rank", rank=2, estimator="one_sided"),
    "low rank, signs": dict(structure="low_rank", rank=3, distribution="rademacher", num_samples=2),
    "a fraction": dict(active=0.5),
}


def every_variant(shard, pairs, kind=Toy):
    """The weights of pairs of a variant and a dtype; ``shard`` takes a plain model."""
    return {
        (name, dtype): replayed(shard(toy(dtype, kind)), **VARIANTS[name]) for name, dtype in pairs
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


def least_growth(call):
    """The most that a call takes in memory, without what other threads happen to hold.

    Threads of gloo free what they exchanged a moment after it is there. They get that moment after
    each layer, or the buffers of the next would count beside those of the last.
    """
    pause = nn.modules.module.register_module_forward_hook(lambda *_: time.sleep(0.002))
    try:
        return min(growth(call).most for _ in range(4))
    finally:
        pause.remove()
