"""A frozen base and an adapter, trained in every mode."""

import torch
from torch import nn
from torch.nn import Parameter

from zofo_optim import HybridZOFO

MODES = ("fo", "zo", "hybrid")


class Model(nn.Module):
    """A frozen base and an adapter; every parameter matters. Always the same weights."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def draw(*shape):
            return Parameter(torch.randn(*shape, generator=generator).to(dtype))

        self.base, self.scale, self.adapter = draw(3, 4), draw(3), draw(3)
        self.base.requires_grad_(False)
        self.scale.requires_grad_(False)
        self.register_buffer("x", torch.linspace(-1, 1, 4, dtype=dtype))

    def forward(self):
        return ((self.base @ self.x) * self.scale + self.adapter).square().sum()


def make(model, mode, named=False, **options):
    """An optimizer of all of a model's parameters; two groups in "hybrid"."""
    model.requires_grad_(mode == "fo")
    model.adapter.requires_grad_(True)
    given = list(model.named_parameters()) if named else list(model.parameters())
    if mode == "fo":
        return HybridZOFO(given, **options)
    rate = {"lr": options.get("lr", 1e-3)}
    if mode == "zo":
        return HybridZOFO(given, mode="zo", **{**rate, **options})
    groups = [{"params": given[:2], "mode": "zo", "mu": 1e-2, **rate}, {"params": given[2:]}]
    return HybridZOFO(groups, **options)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step(model)
    return [p.detach().clone() for p in model.parameters()]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
