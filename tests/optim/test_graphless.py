"""No graph for zeroth-order parameters: what a step's backward keeps, and what it leaves alone."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from experiments.measure import growth
from zofo_optim import HybridZOFO

WIDTH, DEPTH, ROWS = 64, 8, 512
PERTURBATIONS = ["in_place", "streamed"]


def layers():
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)]
    return nn.Sequential(*parts)


def optimizer_of(net, lowest, **options):
    """First-order from one layer up, zeroth-order below; all require gradients."""
    below = [p for layer in net[:lowest] for p in layer.parameters()]
    above = [p for layer in net[lowest:] for p in layer.parameters()]
    groups = [dict(params=below, mode="zo", lr=1e-4), dict(params=above, lr=1e-2)]
    return HybridZOFO(groups, **{"backend": "cpu", "foreach": False, **options})


def kept_by(net, optimizer, x):
    """Bytes that autograd saves in a step, of what is no parameter, by storage."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr(), storage.nbytes()] = tensor  # keeps the address taken
        return tensor

    def closure():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return net(x).square().mean()

    optimizer.step(closure)
    return sum(size for _, size in found)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("lowest", [0, 3, DEPTH - 1])
def test_autograd_keeps_no_activation_below(perturbation, lowest):
    net, x = layers(), torch.randn(ROWS, WIDTH)
    optimizer = optimizer_of(net, lowest, perturbation=perturbation)
    optimizer.step(lambda: net(x).square().mean())
    one = 4 * ROWS * WIDTH
    above = DEPTH - lowest
    # the lowest layer's input, and each layer's output, which is the next one's input
    assert kept_by(net, optimizer, x) == (above + 1) * one


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_nothing_below_has_a_graph_or_a_gradient(perturbation):
    net, x, seen = layers(), torch.randn(4, WIDTH), []
    optimizer = optimizer_of(net, 3, perturbation=perturbation)
    for number, layer in enumerate(net):
        layer.register_forward_hook(lambda m, i, o, n=number: seen.append((n, o.requires_grad)))
    optimizer.step(lambda: net(x).square().mean())
    assert {n for n, graph in seen if graph} == set(range(3, DEPTH))
    assert all(p.grad is None for layer in net[:3] for p in layer.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_the_peak_is_that_of_frozen_weights():
    peaks = []
    for frozen in (False, True):
        net, x = layers(), torch.randn(ROWS, WIDTH)
        net[:6].requires_grad_(not frozen)
        optimizer = optimizer_of(net, 6)

        def step(net=net, x=x, optimizer=optimizer):
            optimizer.zero_grad()
            optimizer.step(lambda: net(x).square().mean())

        step()
        peaks.append(growth(step).most)
    assert abs(peaks[0] - peaks[1]) < 4 * ROWS * WIDTH  # one activation, of six below


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_requires_grad_is_restored_whatever_happens(perturbation, at):
    net, x, calls = layers(), torch.randn(4, WIDTH), []
    net[0].requires_grad_(False)
    before = [p.requires_grad for p in net.parameters()]
    optimizer = optimizer_of(net, 3, perturbation=perturbation)

    def closure():
        calls.append(1)
        if len(calls) == at:
            raise KeyError("broken")
        return net(x).square().mean()

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert [p.requires_grad for p in net.parameters()] == before


def test_what_a_step_does_not_move_has_no_graph_either():
    """``active`` leaves tensors as they are, in the backward too."""
    net, x, seen = layers(), torch.randn(4, WIDTH), []
    optimizer = optimizer_of(net, 3, active=0.2)
    net[2].register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
    for _ in range(3):
        optimizer.step(lambda: net(x).square().mean())
    assert not any(seen)


def test_gradients_that_were_there_stay():
    """Of another loss, say: the optimizer does not own them."""
    net, x = layers(), torch.randn(4, WIDTH)
    net(x).mean().backward()
    kept = [p.grad for p in net[0].parameters()]
    values = [g.clone() for g in kept]
    optimizer_of(net, 3).step(lambda: net(x).square().mean())
    for p, g, value in zip(net[0].parameters(), kept, values, strict=True):
        assert p.grad is g
        assert torch.equal(g, value)


def test_a_checkpoint_that_would_leave_gradients_out_is_refused():
    """A re-entrant one, whose inputs come from zeroth-order weights alone."""
    table, net = nn.Embedding(5, WIDTH), layers()
    groups = [
        dict(params=table.parameters(), mode="zo", lr=1e-4),
        dict(params=net.parameters(), lr=1e-2),
    ]
    optimizer = HybridZOFO(groups)

    def loss(reentrant):
        h = checkpoint(net, table(torch.tensor([1, 2])), use_reentrant=reentrant)
        return h.square().mean()

    with pytest.raises(RuntimeError, match="must not checkpoint first-order layers"):
        optimizer.step(lambda: loss(True))
    optimizer.step(lambda: loss(False))
    assert all(p.grad is not None for p in net.parameters())


def test_displaced_evaluations_with_a_backward_inside_have_none_either():
    net, x = layers(), torch.randn(4, WIDTH)
    optimizer = optimizer_of(net, 3)

    def penalized():
        at = x.clone().requires_grad_()
        net(at).mean().backward(inputs=[at])
        return net(x).square().mean() + at.grad.square().sum()

    optimizer.step(penalized)
    assert all(p.grad is None for layer in net[:3] for p in layer.parameters())
