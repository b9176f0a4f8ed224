"""Zeroth-order groups without parameters, as where all of them became first-order."""

import warnings

import torch
from torch import nn

from zofo_optim import HybridZOFO


def test_nothing_is_perturbed_for_them():
    torch.manual_seed(0)
    net, twin = nn.Linear(3, 1), nn.Linear(3, 1)
    twin.load_state_dict(net.state_dict())
    x, calls = torch.randn(4, 3), []
    groups = [dict(params=net.parameters(), lr=0.1), dict(params=[], mode="zo", lr=1e-3)]
    optimizer = HybridZOFO(groups, estimator="one_sided")
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)

    def closure():
        calls.append(1)
        return net(x).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            optimizer.zero_grad()
            optimizer.step(closure)
            plain.zero_grad()
            twin(x).square().mean().backward()
            plain.step()
    assert len(calls) == 8
    assert torch.equal(net.weight, twin.weight)
