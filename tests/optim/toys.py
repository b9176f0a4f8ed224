"""A toy problem and a small network, and what the tests of a step ask of them."""

import itertools
import random

import numpy as np
import torch
from torch import nn
from torch.nn import Parameter

from zofo_optim import HybridZOFO, hybrid_param_groups

MODES = ("fo", "zo", "hybrid")
ESTIMATORS = ("one_sided", "two_sided")
# (mode, estimator, number of samples): every pattern of evaluations
CONFIGURATIONS = [
    ("fo", "two_sided", 3),
    *itertools.product(("zo", "hybrid"), ESTIMATORS, (1, 3)),
]
ULPS = {  # allowed distance of a restored weight in [1, 2), over all moves of a step
    torch.float64: 1e-15,
    torch.float32: 4 * 2.0**-23,
    torch.bfloat16: 0.0,
}


def evaluations(mode, estimator, samples):
    """How often a step evaluates its closure; the first one does so once more, to compare."""
    if mode == "fo":
        return 1
    if estimator == "one_sided":
        return 1 + samples
    return (mode == "hybrid") + 2 * samples


class Toy:
    """A frozen base x and an adapter y; weights in [1.2, 1.8], far from powers of two."""

    def __init__(self, dtype=torch.float64):
        self.x = Parameter(torch.linspace(1.2, 1.8, 12).reshape(3, 4).to(dtype))
        self.y = Parameter(torch.linspace(1.2, 1.8, 5).to(dtype))
        self.calls = 0

    def loss(self):
        return (self.x.double() ** 2).sum() * self.y.double().mean() + self.y.double().exp().sum()

    def __call__(self):
        self.calls += 1
        return self.loss()

    def optimizer(self, mode, **options):
        self.x.requires_grad_(mode == "fo")
        self.y.requires_grad_(mode != "zo")
        rate = {"lr": options.get("lr", 1e-3)}
        if mode != "hybrid":
            return HybridZOFO([self.x, self.y], mode=mode, **{**rate, **options})
        groups = [{"params": [self.x], "mode": "zo", **rate}, {"params": [self.y], "mode": "fo"}]
        return HybridZOFO(groups, **options)

    def values(self):
        return [self.x.detach().clone(), self.y.detach().clone()]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_restored(toy, before, mode):
    """Zeroth-order weights to ULPS, first-order ones exactly."""
    dtype = toy.x.dtype
    for value, old, moved in zip(toy.values(), before, (mode != "fo", mode == "zo"), strict=True):
        torch.testing.assert_close(value, old, rtol=0, atol=ULPS[dtype] if moved else 0.0)


def random_states():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        [np.asarray(part).tolist() for part in np.random.get_state()],  # noqa: NPY002
    )


def seed_everything(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def draw():
    """Something from every global generator."""
    return torch.rand(()).item(), random.random(), float(np.random.rand())  # noqa: NPY002


def told(caught):
    return [str(w.message) for w in caught]


class Net(nn.Module):
    """A frozen layer, dropout, a trainable head; float64."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.base = nn.Linear(4, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 1, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
        self.base.requires_grad_(False)
        self.batch = torch.randn(8, 4, generator=generator, dtype=torch.float64)

    def forward(self):
        return self.head(self.base(self.batch).tanh()).square().mean()

    def values(self):
        return [p.detach().clone() for p in self.parameters()]

    def optimizer(self, **options):
        groups = hybrid_param_groups(self, zo={"lr": 1e-2}, fo={"lr": 1e-2}, verbose=False)
        return HybridZOFO(groups, momentum=0.9, **options)


def run(optimizer, closure, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step(closure)
