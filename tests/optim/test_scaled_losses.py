"""Losses that a GradScaler scales train as without one."""

import warnings

import pytest
import torch
from conftest import each_of
from toys import Net

perturbation = each_of(["in_place", "streamed"])


def scaled_and_returned(net, scaler):
    return lambda: scaler.scale(net())


def scaled_in_the_closure(net, scaler):
    def closure():
        loss = net()
        scaler.scale(loss).backward()
        return loss

    return closure


def trained(make, perturbation, steps=3):
    net, scaler = Net(), torch.amp.GradScaler("cpu")
    optimizer = net.optimizer(perturbation=perturbation)
    closure = make(net, scaler)
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(closure)
        scaler.step(optimizer)
        scaler.update()
    return net, optimizer


@pytest.mark.parametrize("make", [scaled_in_the_closure, scaled_and_returned])
def test_scaled_losses_train_as_without(make, perturbation):
    plain = Net()
    expected = plain.optimizer(perturbation=perturbation)
    for _ in range(3):
        expected.zero_grad()
        expected.step(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net, optimizer = trained(make, perturbation)
    # the scale is a power of two, so that nothing rounds otherwise
    torch.testing.assert_close(net.values(), plain.values(), rtol=0, atol=1e-14)
    assert torch.equal(optimizer.projected_grads, expected.projected_grads)
    assert torch.equal(optimizer.last_loss, expected.last_loss)
    assert not torch.equal(net.base.weight, Net().base.weight)


def test_a_step_that_the_scaler_skips_leaves_nothing_to_the_next():
    net, scaler = Net(), torch.amp.GradScaler("cpu")
    optimizer = net.optimizer()
    before, scale = net.values(), scaler.get_scale()
    optimizer.backward(scaled_in_the_closure(net, scaler))
    net.head.weight.grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale / 2
    torch.testing.assert_close(net.values(), before, rtol=0, atol=1e-14)
    optimizer.zero_grad()
    assert optimizer.accumulated is None


@pytest.mark.parametrize("enabled", [True, False])
def test_other_products_are_the_loss(enabled):
    """A disabled scaler scales nothing; a weighted loss is the loss."""
    net, scaler = Net(), torch.amp.GradScaler("cpu", enabled=enabled)
    optimizer = net.optimizer()

    def weighted():
        if enabled:
            scaler.scale(torch.ones(()))
            return net() * torch.tensor(65536.0)
        return scaler.scale(net())

    optimizer.backward(weighted)
    torch.testing.assert_close(optimizer.last_loss, weighted().detach(), rtol=1e-3, atol=0)
