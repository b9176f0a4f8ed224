"""Quadratics of known curvature, a small net, and what must not change."""

import copy
import random

import numpy as np
import torch
from conftest import same_bits
from torch import nn
from torch.nn import Parameter

from zofo_optim import HybridZOFO, hybrid_param_groups

ZO_CURVATURES = torch.linspace(0.1, 3.0, 30, dtype=torch.float64)
FO_CURVATURES = torch.tensor([4.0, 1.0, 1.0, 0.5], dtype=torch.float64)


class Quadratic:
    """f = (x' A x + y' B y) / 2 with diagonal A and B, x zeroth-order, y first-order."""

    def __init__(self, modes=("zo", "fo"), **options):
        draw = torch.Generator().manual_seed(0)
        self.x = Parameter(torch.randn(30, generator=draw, dtype=torch.float64), False)
        self.y = Parameter(torch.randn(4, generator=draw, dtype=torch.float64))
        groups = {
            "zo": dict(params=[self.x], mode="zo", lr=1.0, mu=1e-3),
            "fo": dict(params=[self.y], mode="fo", lr=1.0),
        }
        self.optimizer = HybridZOFO([groups[mode] for mode in modes], **options)

    def __call__(self):
        of_x, of_y = ZO_CURVATURES * self.x.square(), FO_CURVATURES * self.y.square()
        return (of_x.sum() + of_y.sum()) / 2

    @property
    def gradient(self):
        """With regard to x."""
        return ZO_CURVATURES * self.x.detach()


class Net(nn.Module):
    """With batch norm, dropout, a frozen base and a head that trains."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.base, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
            self.x = torch.randn(3, 8, 4)
        self.drop = nn.Dropout(0.2)
        self.base.requires_grad_(False)

    def loss(self, batch):
        hidden = torch.tanh(self.norm(self.base(self.x[batch])))
        return self.head(self.drop(hidden)).square().mean()


def hybrid_net(**options):
    """The net, its optimizer after two steps, and the closures of three batches."""
    net = Net()
    groups = hybrid_param_groups(net, dict(lr=1e-3), dict(lr=1e-2), verbose=False)
    options = {"fo_optimizer": torch.optim.AdamW, **options}
    optimizer = HybridZOFO(groups, **options)
    closures = [lambda batch=batch: net.loss(batch) for batch in range(3)]
    torch.manual_seed(5)  # of dropout
    for closure in closures[:2]:
        optimizer.step(closure)
    return net, optimizer, closures


def everything(net, optimizer):
    """A copy of all that a measurement must leave: weights, state, gradients, generators."""
    return (
        copy.deepcopy(net.state_dict()),
        copy.deepcopy(optimizer.state_dict()),
        [None if p.grad is None else (p.grad, p.grad.clone()) for p in net.parameters()],
        [p.requires_grad for p in net.parameters()],
        (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
        (optimizer.last_loss, optimizer.skipped_steps, optimizer.moves, optimizer.listeners),
    )


def check_same(before, net, optimizer):
    """To the bit; gradients are the same tensors."""
    now = everything(net, optimizer)
    for was, name in zip(before[0].values(), now[0], strict=True):
        assert same_bits(was, now[0][name]), name
    assert _plain(before[1]) == _plain(now[1])
    for was, gradient in zip(before[2], now[2], strict=True):
        assert (was is None) == (gradient is None)
        if was is not None:
            assert was[0] is gradient[0]
            assert same_bits(was[1], gradient[1])
    assert before[3] == now[3]
    assert torch.equal(before[4][0], now[4][0])
    assert before[4][1] == now[4][1]
    assert str(before[4][2]) == str(now[4][2])
    assert before[5][0] is now[5][0]
    assert before[5][1:] == now[5][1:]


def _plain(value):
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.tolist())
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
