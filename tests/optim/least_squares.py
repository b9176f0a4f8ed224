"""Least squares as torch's own tests train it, in every mode.

``mode="fo"`` and ``mode="zo"`` put all parameters in one kind of group; "hybrid" puts the first
one in a ZO group.
"""

import torch
from torch.nn import Parameter

from zofo_optim import HybridZOFO

MODES = ("fo", "zo", "hybrid")
SGD_INPUTS = {
    "default": {},
    "lr": {"lr": 1e-2},
    "tensor lr": {"lr": torch.tensor(0.001)},
    "weight_decay": {"weight_decay": 0.5},
    "momentum": {"momentum": 0.9},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}
SGD_FLAGS = {
    "plain": {},
    "foreach": {"foreach": True},
    "forloop": {"foreach": False},
    "fused": {"fused": True},
}


def make(params, mode, **options):
    """A HybridZOFO over ``params``; in "hybrid" the first one is zeroth-order."""
    params = list(params)
    if mode == "fo":
        return HybridZOFO(params, **options)
    rate = {"lr": options.get("lr", 1e-3)}
    if mode == "zo":
        return HybridZOFO(params, mode="zo", **{**rate, **options})
    groups = [{"params": params[:1], "mode": "zo", **rate}, {"params": params[1:], "mode": "fo"}]
    return HybridZOFO(groups, **options)


class Problem:
    """Least squares in a weight and a bias, small enough that ZO at lr=1e-2 is stable."""

    def __init__(self, dtype=torch.float32, strided=False, shape=(3, 4)):
        generator = torch.Generator().manual_seed(1)

        def draw(*size):
            values = torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
            return torch.stack((values, values), -1)[..., 0] if strided else values

        self.weight, self.bias = Parameter(draw(*shape)), Parameter(draw(shape[0]))
        self.params = [self.weight, self.bias]
        self.input = draw(shape[1])
        assert self.weight.is_contiguous() != strided

    def loss(self):
        return (self.weight.mv(self.input) + self.bias).square().sum()

    def closure(self, optimizer):
        """In the style that torch documents."""

        def closure():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure

    def values(self):
        return [p.detach().clone() for p in self.params]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def torch_step(optimizer, closure):
    closure()
    optimizer.step()


def rosenbrock(p):
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
