"""Losses of two blocks of parameters, and their Hessians."""

import torch
from torch.nn import Parameter

SIZES = {"x": 18, "y": 5}


def blocks(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return {
        name: Parameter(torch.randn(size, generator=generator, dtype=torch.float64).to(device))
        for name, size in SIZES.items()
    }


def quadratic():
    """z'Hz / 2 + <b, z>, indefinite, whose blocks are coupled."""
    generator = torch.Generator().manual_seed(0)
    size = sum(SIZES.values())
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    hessian, slope = root @ root.T / 4 - torch.eye(size, dtype=torch.float64), root[0]
    params = blocks()

    def closure():
        z = torch.cat([*params.values()])
        return z @ hessian @ z / 2 + slope @ z

    return params, closure


def logistic(device="cpu"):
    """Logistic regression of 40 examples."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, sum(SIZES.values()), generator=generator, dtype=torch.float64)
    labels = (torch.rand(40, generator=generator) < 0.5).double()
    features, labels, params = features.to(device), labels.to(device), blocks(device)

    def closure():
        logits = features @ torch.cat([*params.values()])
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)

    return params, closure


def hessian_of(closure, p):
    """The block of ``p`` on the diagonal, and the gradient, by double backward an element."""
    (gradient,) = torch.autograd.grad(closure(), p, create_graph=True)
    rows = [torch.autograd.grad(g, p, retain_graph=True)[0] for g in gradient]
    return torch.stack(rows), gradient.detach()


class Counted:
    def __init__(self, closure):
        self.closure, self.calls = closure, 0

    def __call__(self):
        self.calls += 1
        return self.closure()
