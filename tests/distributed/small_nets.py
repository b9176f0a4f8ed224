"""Networks, batches and loops that every rank and the test's own process make alike."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from zofo_optim import HybridZOFO, hybrid_param_groups

ROWS = 8
"""Of the global batch of a step."""
STREAMED = {"perturbation": "streamed"}
LOW_RANK = {**STREAMED, "structure": "low_rank", "rank": 2}
OF_EXAMPLES = {**LOW_RANK, "directions": "per_example"}


def network(*, hybrid=True, dtype=torch.float64):
    """Two frozen layers; a head that trains where it is ``hybrid``."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
    ).to(dtype)
    model.requires_grad_(False)
    model[4].requires_grad_(hybrid)
    return model


def wrapped(model):
    return DistributedDataParallel(model)


def batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(ROWS, 4, generator=generator, dtype=dtype)


def alone(rank):
    """A group of this process."""
    return dist.new_group([rank], use_local_synchronization=True)


def optimizer_of(model, zo=None, **options):
    fo = {"lr": 1e-2, "momentum": 0.9}
    trains = any(p.requires_grad for p in model.parameters())
    groups = hybrid_param_groups(
        model, {"lr": 1e-2, "mu": 1e-3, **(zo or {})}, fo if trains else None, verbose=False
    )
    return HybridZOFO(groups, **options)


def closure_of(call, x, *, of_examples=False):
    def closure():
        losses = call(x).square().flatten()
        return losses if of_examples else losses.mean()

    return closure


def train(model, call, rows, steps=4, **options):
    """Train, and return the parameters; ``rows`` selects this process's of a batch."""
    of_examples = options.get("directions") == "per_example"
    optimizer = optimizer_of(model, **options)
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.step(closure_of(call, batch(step)[rows], of_examples=of_examples))
    return parameters(model)


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def apart(some, others):
    """The largest difference, relative to the largest element of its tensor."""
    pairs = zip(some, others, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
