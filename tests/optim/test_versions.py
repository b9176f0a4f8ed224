"""Graphs of one's own that saved zeroth-order weights, back-propagated after a call."""

import pytest
import torch
from torch.nn import Parameter

from zofo_optim import HybridZOFO


def built(perturbation):
    x, y = torch.full((3,), 1.3), Parameter(torch.ones(3))
    groups = [dict(params=[x], mode="zo", lr=1e-3), dict(params=[y], lr=1e-3)]
    return x, y, HybridZOFO(groups, perturbation=perturbation)


def test_streamed_evaluations_leave_the_versions():
    """Also the first ones, which verify; an update is told to autograd."""
    x, y, optimizer = built("streamed")
    for _ in range(2):
        before, content = x._version, x.clone()
        auxiliary = (x * y).square().sum()
        optimizer.backward(lambda: (x * y).sum())
        assert x._version == before
        assert torch.equal(x, content)
        y.grad = None
        auxiliary.backward()
        torch.testing.assert_close(y.grad, 2 * x * x)
        optimizer.zero_grad()
    auxiliary = (x * y).square().sum()
    optimizer.step(lambda: (x * y).sum())
    assert x._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        auxiliary.backward()


def test_in_place_torch_says_that_the_weights_moved():
    x, y, optimizer = built("in_place")
    auxiliary = (x * y).sum()
    optimizer.backward(lambda: (x * y).sum())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        auxiliary.backward()
