"""Closures of all kinds: what is left as it was, and what is refused."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from zofo_optim.costs import costs_of

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 1, 0])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))


def all_flops(net, closure):
    costs = costs_of(net, closure)
    return costs.flops([t.name for t in costs.tensors])


def test_closures_that_call_backward_themselves(net):
    expected = all_flops(net, lambda: F.cross_entropy(net(X), Y))

    def own():
        net.zero_grad()
        loss = F.cross_entropy(net(X), Y)
        loss.backward()
        return loss.detach()

    def number():
        loss = F.cross_entropy(net(X), Y)
        torch.autograd.backward(loss)
        return loss.item()

    def batches():
        for half in (slice(0, 2), slice(2, 5)):
            F.cross_entropy(net(X[half]), Y[half]).backward()

    assert all_flops(net, own) == all_flops(net, number) == all_flops(net, batches) == expected
    assert all_flops(net, lambda: F.cross_entropy(net(X), Y, reduction="none")) == expected


def test_all_is_as_before():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    net[0].requires_grad_(False)
    net(X).sum().backward()
    gradient = net[3].weight.grad
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    before = {name: (t.clone(), t._version) for name, t in tensors.items()}
    before_gradient = gradient.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    def closure():
        net.zero_grad(set_to_none=False)
        random.random()
        np.random.rand()  # noqa: NPY002
        return F.cross_entropy(net(X), Y)

    costs = costs_of(net, closure, fo_optimizer=torch.optim.AdamW)
    costs.peak([costs.tensors[0].name])
    assert [p.requires_grad for p in net.parameters()] == [False] * 2 + [True] * 4
    assert net[3].weight.grad is gradient
    assert torch.equal(gradient, before_gradient)
    assert net[0].weight.grad is None
    for name, (value, _) in before.items():
        assert torch.equal(tensors[name], value)
    assert all(p._version == before[n][1] for n, p in net.named_parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


def test_all_is_as_before_where_the_closure_fails(net):
    net[0].requires_grad_(False)
    net[2].weight.grad = torch.ones(3, 8)
    state = torch.get_rng_state()

    def closure():
        torch.rand(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        costs_of(net, closure)
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]
    assert net[2].weight.grad is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, error):
        return 2 * error


def penalty(net):
    x = X.clone().requires_grad_()
    loss = F.cross_entropy(net(x), Y)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + slope.square().sum()


def again(net, reentrant):
    x = X.clone().requires_grad_()
    return net[1:](checkpoint(net[0], x, use_reentrant=reentrant)).sum()


@torch.no_grad()
def without_graph(net):
    return net(X).sum()


@pytest.mark.parametrize(
    ("closure", "error", "said"),
    [
        (lambda net: net(X).sum().item(), TypeError, "must return the loss as a tensor"),
        (lambda net: None, TypeError, "must return the loss as a tensor.*got NoneType"),
        (lambda net: net(X).sum().detach(), ValueError, "without a graph"),
        (without_graph, ValueError, "without a graph"),
        (lambda net: X.sum(), ValueError, "without a graph"),
        (lambda net: net(X), ValueError, r"got shape \(5, 3\)"),
        (lambda net: torch.fft.fft(net(X)).sum(), TypeError, "must return a real loss"),
        (penalty, ValueError, "gradient penalty"),
        (lambda net: again(net, False), ValueError, "gradient checkpointing"),
        (lambda net: again(net, True), ValueError, "CheckpointFunction"),
        (lambda net: net(Doubled.apply(net[0](X)) @ torch.ones(8, 4)).sum(), ValueError, "Doubled"),
    ],
)
def test_what_cannot_be_counted_is_refused(net, closure, error, said):
    with pytest.raises(error, match=said):
        costs_of(net, lambda: closure(net))


def test_sparse_tensors_are_refused(net):
    with pytest.raises(ValueError, match="sparse"):
        costs_of(net, lambda: (X.to_sparse() @ net[0].weight.t()).sum())


@pytest.mark.parametrize(
    ("model", "parameters", "error", "said"),
    [
        ("net", None, TypeError, "model must be a torch.nn.Module, got str"),
        (nn.ReLU(), None, ValueError, "must have a parameter"),
        (nn.Linear(2, 2), {"a": torch.ones(2).long()}, TypeError, "leaf tensors of real numbers"),
        (nn.Linear(2, 2), {"a": 3}, TypeError, "got 'a', of int"),
        (nn.Linear(2, 2), {}, ValueError, "must have a parameter"),
    ],
)
def test_wrong_models_and_candidates(model, parameters, error, said):
    with pytest.raises(error, match=said):
        costs_of(model, lambda: torch.zeros(()), parameters)


def test_hooks_of_modules_are_named(net):
    handle = net[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"BackwardHook.*\(register_full_backward_hook\)"):
        costs_of(net, lambda: net(X).sum())
    handle.remove()


def test_inference_mode_of_the_caller_does_not_matter(net):
    names = ["2.weight", "0.bias"]
    expected = costs_of(net, lambda: net(X).sum())
    with torch.inference_mode():
        found = costs_of(net, lambda: net(X).sum())
        assert found == expected
        assert found.peak(names) == expected.peak(names)
