"""Closures that give another loss at the same point, or write to weights, are told of at once."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import each_of
from torch import nn
from toys import CONFIGURATIONS, Toy, evaluations, told

from zofo_optim import HybridZOFO

perturbation = each_of(["in_place", "streamed"])
ZERO_ORDER = [c for c in CONFIGURATIONS if c[0] != "fo"]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).requires_grad_(False)


def new_batches(net):
    batches = iter(torch.randn(100, 16, 4))
    return lambda: net(next(batches)).square().mean()


def own_generator(net):
    generator, batch = torch.Generator().manual_seed(0), torch.randn(16, 4)
    return lambda: net(batch).square().mean() + torch.rand((), generator=generator)


def counted(net):
    calls, batch = [], torch.randn(16, 4)
    return lambda: net(batch).square().mean() * (calls.append(1) or len(calls))


@pytest.mark.parametrize("make", [new_batches, own_generator, counted])
def test_a_closure_that_does_not_repeat_warns_once(make, perturbation):
    net = model()
    optimizer = HybridZOFO(net.parameters(), mode="zo", lr=1e-6, perturbation=perturbation)
    closure = make(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(closure)
            optimizer = copy.deepcopy(optimizer)
    assert [m[:42] for m in told(caught)] == ["closure gave two losses at the same point,"]
    assert "same batch" in told(caught)[0]


@pytest.mark.parametrize(("mode", "estimator", "samples"), ZERO_ORDER)
def test_the_first_step_evaluates_once_more(mode, estimator, samples):
    toy = Toy()
    optimizer = toy.optimizer(mode, estimator=estimator, num_samples=samples)
    count, total = evaluations(mode, estimator, samples), 0
    for extra in (1, 0, 0):
        optimizer.zero_grad()
        optimizer.step(toy)
        total += count + extra
        assert toy.calls == total


def test_a_sound_closure_does_not_warn(perturbation):
    net, batch = model(), torch.randn(16, 4)
    optimizer = HybridZOFO(net.parameters(), mode="zo", lr=1e-6, perturbation=perturbation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: F.dropout(net(batch), 0.5).square().mean())


WRITES = {
    "a torch call": lambda w: w.detach().add_(0.5),
    "max_norm": lambda w: F.embedding(torch.tensor([0]), w, max_norm=0.5),
    "renormalising": lambda w: w.detach().div_(w.detach().norm()),
}


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("write", WRITES)
def test_a_closure_that_writes_to_weights_raises(write, at):
    w, other = torch.ones(3, 4), torch.ones(2)
    y, calls = torch.ones(4, requires_grad=True), []
    zo = dict(params=[("other", other), ("w", w)], mode="zo", lr=1e-3)
    optimizer = HybridZOFO([zo, dict(params=[("y", y)])])

    def closure():
        calls.append(1)
        if len(calls) == at:
            with torch.no_grad():
                WRITES[write](w)
        return (w * y).sum() + other.sum()

    with pytest.raises(RuntimeError, match=r"must not write to .* parameter 'w': the weights are"):
        optimizer.step(closure)
    torch.testing.assert_close(other, torch.ones(2), rtol=0, atol=1e-6)
    assert optimizer.accumulated is None
    optimizer.step(lambda: (w * y).sum() + other.sum())  # and it works on


def test_several_that_are_written_are_all_named():
    a, b = torch.ones(2), torch.ones(2)
    optimizer = HybridZOFO([("a", a), ("b", b)], mode="zo", lr=1e-3)
    with pytest.raises(RuntimeError, match=r"parameter 'a' \(2 in all: a, b\)"):
        optimizer.step(lambda: (a.mul_(1) + b.mul_(1)).sum())
