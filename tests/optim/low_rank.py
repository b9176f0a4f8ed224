"""Functions of weights, along directions of low rank: what a closure sees, and what it must."""

import math
from contextlib import contextmanager

import torch
from torch.nn import Parameter

from zofo_kernels import perturbed
from zofo_optim import HybridZOFO
from zofo_optim.perturbation.streaming import Streaming

MU = 0.125
STREAMED = dict(structure="low_rank", perturbation="streamed")
PER_EXAMPLE = dict(STREAMED, directions="per_example")


def randn(*shape, seed=0, dtype=torch.float64):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype)


def named(parts):
    """As zeroth-order parameters with names."""
    return [(name, Parameter(part, False)) for name, part in parts.items()]


def optimizer_of(params, *, lr=0.0, mu=MU, seed=3, **options):
    group = dict(params=params, mode="zo", lr=lr, mu=mu)
    return HybridZOFO([group], seed=seed, **{**STREAMED, **options})


@contextmanager
def copies(patch):
    """The names of the parameters of which a perturbed copy was made while this runs.

    Copies of vectors are made together, by others.
    """
    found, make = [], Streaming._perturbed

    def counted(self, source, part=None, rows=None):
        found.append(source.name)
        return make(self, source, part, rows)

    with patch.context() as patched:
        patched.setattr(Streaming, "_perturbed", counted)
        yield found


class Seen:
    """A closure that keeps what its function gave in each evaluation.

    Args:
        function: of the parameters, by name; gives a tensor.
        params: as :func:`named` gives them.
        rows: B, where the loss is that of each example: a sum over its part of the result.
    """

    def __init__(self, function, params, rows=None):
        self.function, self.params, self.rows = function, dict(params), rows
        self.outputs = []

    def __call__(self):
        y = self.function(**self.params)
        self.outputs.append(y.detach().clone())
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        if self.rows is None:
            return (y.flatten() * torch.linspace(0.5, 1.5, y.numel())).sum() / math.sqrt(y.numel())
        y = y.reshape(self.rows, -1)
        return (y * torch.linspace(0.5, 1.5, y.shape[1])).sum(1) / math.sqrt(y.shape[1])


def displaced(function, params, direction, scale):
    """The function of weights that are displaced themselves."""
    params = [(name, p) for name, p in params]
    return function(
        **{
            name: perturbed(p, direction, scale, index=index)
            for index, (name, p) in enumerate(params)
        }
    )


def wanted(function, params, optimizer, sign, rows=None, first=0):
    """What the closure must see at this sign: with ``rows`` examples, each along its own."""
    (group,) = optimizer.zo_groups()
    if rows is None:
        return displaced(function, params, group.direction(0), sign * MU)
    each = [displaced(function, params, group.direction(first + s), sign * MU) for s in range(rows)]
    parts = [y.reshape(rows, -1)[s] for s, y in enumerate(each)]
    return torch.stack(parts).view(each[0].shape)
