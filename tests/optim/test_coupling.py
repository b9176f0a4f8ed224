"""Coupling: first-order gradients of f(x, y) + alpha mean f(x +- mu v, y)."""

import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from experiments.measure import growth
from zofo_kernels import Direction, _torch_compat, noise
from zofo_optim import HybridZOFO

ALPHA, MU = 0.3, 1e-2
MODES = [
    (perturbation, structure)
    for perturbation in ("in_place", "streamed")
    for structure in ("full", "low_rank")
]


class Net(nn.Module):
    """First-order below zeroth-order weights, which gradients go through, and above them."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Linear(5, 7)
        self.norm, self.middle = nn.LayerNorm(7), nn.Linear(7, 6)
        self.conv = nn.Conv2d(1, 2, (1, 2), bias=False)
        self.scale = nn.Parameter(torch.randn(2, 5))
        self.above = nn.Linear(5, 1)
        self.to(dtype)

    def forward(self, x, again=False):
        h = torch.tanh(self.below(x))
        h = checkpoint(self.inside, h, use_reentrant=False) if again else self.inside(h)
        return self.above(h)

    def inside(self, h):
        h = torch.tanh(self.middle(self.norm(h)))
        h = self.conv(h.view(len(h), 1, 1, 6))[:, :, 0]
        return torch.tanh(h[:, 0] * self.scale[0] + h[:, 1] @ (self.scale[1].diag() + 1))

    def split(self):
        first = [*self.below.parameters(), *self.above.parameters()]
        zeroth = [p for p in self.parameters() if all(p is not q for q in first)]
        return zeroth, first


def batch(dtype=torch.float64):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype)


def optimizer_of(net, **options):
    zeroth, first = net.split()
    groups = [dict(params=zeroth, mode="zo", lr=1e-3, mu=MU), dict(params=first, lr=0.1)]
    return HybridZOFO(groups, **{"coupling": ALPHA, "backend": "cpu", **options})


def by_hand(net, loss, points, structure):
    """The gradients, at weights that are written, one point after the other."""
    zeroth, first = net.split()
    kept = [p.detach().clone() for p in zeroth]
    found = list(torch.autograd.grad(loss(), first))
    for sample, sign in points:
        for index, (p, w) in enumerate(zip(zeroth, kept, strict=True)):
            direction = Direction(0, 0, sample, "gaussian", rank=int(structure == "low_rank"))
            p.data.copy_(w + sign * MU * noise(p.shape, direction, index=index, dtype=w.dtype))
        there = torch.autograd.grad(loss(), first)
        found = [a + ALPHA / len(points) * b for a, b in zip(found, there, strict=True)]
    for p, w in zip(zeroth, kept, strict=True):
        p.data.copy_(w)
    return found


def points_of(estimator, samples):
    signs = (1,) if estimator == "one_sided" else (1, -1)
    return [(sample, sign) for sample in range(samples) for sign in signs]


def assert_near(found, wanted, error=1e-12):
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= error * (1 + b.abs().max())


@pytest.mark.parametrize("own_backward", [False, True])
@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
@pytest.mark.parametrize(("perturbation", "structure"), MODES)
def test_gradients_are_those_computed_by_hand(perturbation, structure, estimator, own_backward):
    net, x = Net(), batch()
    wanted = by_hand(net, lambda: net(x).square().mean(), points_of(estimator, 2), structure)
    clean = torch.autograd.grad(net(x).square().mean(), net.split()[1])
    chosen = dict(perturbation=perturbation, structure=structure, estimator=estimator)
    optimizer = optimizer_of(net, num_samples=2, **chosen)

    def closure():
        optimizer.zero_grad()
        loss = net(x).square().mean()
        if own_backward:
            loss.backward()
        return loss

    optimizer.backward(closure)
    found = [p.grad for p in net.split()[1]]
    assert_near(found, wanted)
    # the coupled part is there at all
    for a, b in zip(found, clean, strict=True):
        assert (a - b).abs().max() > 0.2 * b.abs().max()
    assert all(p.grad is None for p in net.split()[0])


@pytest.mark.parametrize(("perturbation", "structure"), MODES)
def test_checkpointed_layers_run_again_at_the_perturbed_point(perturbation, structure):
    net, x = Net(), batch()
    wanted = by_hand(net, lambda: net(x).square().mean(), points_of("two_sided", 1), structure)
    optimizer = optimizer_of(net, perturbation=perturbation, structure=structure)
    optimizer.backward(lambda: net(x, again=True).square().mean())
    assert_near([p.grad for p in net.split()[1]], wanted)


@pytest.mark.parametrize(("perturbation", "structure"), MODES)
def test_gradcheck(perturbation, structure):
    """The gradient in y of the coupled objective, against differences of its values in float64."""
    net, x = Net(), batch()
    optimizer = optimizer_of(net, perturbation=perturbation, structure=structure)
    optimizer.backward(lambda: net(x).square().mean())  # the first step's checks

    class Coupled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *values):
            for p, value in zip(net.split()[1], values, strict=True):
                p.data.copy_(value)
            losses = []

            def closure():
                losses.append(net(x).square().mean())
                return losses[-1]

            optimizer.zero_grad()
            with torch.enable_grad():
                optimizer.backward(closure)
            ctx.gradients = [p.grad.clone() for p in net.split()[1]]
            clean, there, back = (loss.detach() for loss in losses)
            return clean + ALPHA * (there + back) / 2

        @staticmethod
        def backward(ctx, above):
            return tuple(above * g for g in ctx.gradients)

    values = [p.detach().clone().requires_grad_() for p in net.split()[1]]
    assert torch.autograd.gradcheck(Coupled.apply, values, eps=1e-5, atol=1e-7)


def test_directions_of_examples_couple_too():
    """An example's loss is that at its own point; the mean over them is back-propagated."""
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))
    net = net.double()
    x, zeroth, first = batch(), [*net[2].parameters()], [*net[0].parameters()]
    losses = []
    for row in range(len(x)):
        kept = [p.detach().clone() for p in zeroth]
        for index, p in enumerate(zeroth):
            direction = Direction(0, 0, row, "gaussian", rank=1)
            p.data.add_(MU * noise(p.shape, direction, index=index, dtype=p.dtype))
        losses.append(torch.autograd.grad(net(x[row]).square().sum() / len(x), first))
        for p, w in zip(zeroth, kept, strict=True):
            p.data.copy_(w)
    clean = torch.autograd.grad(net(x).square().mean(), first)
    wanted = [
        g + ALPHA * sum(part) for g, part in zip(clean, zip(*losses, strict=True), strict=True)
    ]
    groups = [dict(params=zeroth, mode="zo", lr=1e-3, mu=MU), dict(params=first)]
    optimizer = HybridZOFO(
        groups,
        coupling=ALPHA,
        estimator="one_sided",
        structure="low_rank",
        perturbation="streamed",
        directions="per_example",
    )
    optimizer.backward(lambda: net(x).square()[:, 0])
    assert_near([p.grad for p in first], wanted)


def test_accumulates():
    net, x = Net(), batch()
    parts = [x[:2], x[2:]]
    points = points_of("two_sided", 1)
    wanted = by_hand(
        net, lambda: sum(net(part).square().mean() / 2 for part in parts), points, "full"
    )
    optimizer = optimizer_of(net)
    for part in parts:
        optimizer.backward(lambda part=part: net(part).square().mean() / 2)
    assert_near([p.grad for p in net.split()[1]], wanted)
    kept = [p.grad for p in net.split()[1]]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(net.split()[1], kept, strict=True))


@pytest.mark.parametrize(("perturbation", "structure"), MODES)
def test_zero_is_as_without(perturbation, structure):
    """To the bit, and in as many evaluations with gradients: one."""
    weights = []
    for options in ({}, {"coupling": 0}):
        net, x, graphs = Net(torch.float32), batch(torch.float32), []
        optimizer = optimizer_of(
            net, perturbation=perturbation, structure=structure, **{"coupling": 0.0, **options}
        )

        def closure(net=net, x=x, graphs=graphs):
            loss = net(x).square().mean()
            graphs.append(loss.requires_grad)
            return loss

        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(closure)
        assert sum(graphs) == 3
        weights.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_point_without_a_finite_loss_adds_no_gradient():
    net, x = Net(), batch()
    first = net.split()[1]
    clean = torch.autograd.grad(net(x).square().mean(), first)
    other = by_hand(net, lambda: net(x).square().mean(), [(0, -1)], "full")
    calls = []

    def closure():
        calls.append(1)
        loss = net(x).square().mean()
        return loss * math.nan if len(calls) == 2 else loss

    optimizer = optimizer_of(net)
    optimizer.backward(closure)
    # one point of two is left, which has half of the weight
    assert_near([p.grad for p in first], [(a + b) / 2 for a, b in zip(clean, other, strict=True)])
    assert optimizer.skipped_steps == 1


def test_sparse_gradients_couple():
    table = nn.Embedding(9, 3, sparse=True, dtype=torch.float64)
    x = nn.Parameter(torch.randn(3, dtype=torch.float64))
    rows = torch.tensor([1, 1, 4])
    groups = [dict(params=[x], mode="zo", lr=1e-3, mu=MU), dict(params=table.parameters())]
    optimizer = HybridZOFO(groups, coupling=ALPHA, lr=0.1)
    optimizer.backward(lambda: (table(rows) @ x).square().sum())
    assert table.weight.grad.is_sparse
    found, table.weight.grad = table.weight.grad.to_dense(), None
    direction = Direction(0, 0, 0, "gaussian")
    v, wanted = noise(x.shape, direction, dtype=x.dtype), 0.0
    for weight, sign in ((1, 0), (ALPHA / 2, 1), (ALPHA / 2, -1)):
        loss = (table(rows) @ (x.detach() + sign * MU * v)).square().sum()
        wanted = wanted + weight * torch.autograd.grad(loss, table.weight)[0].to_dense()
    assert_near([found], [wanted])


@pytest.mark.parametrize("structure", ["full", "low_rank"])
def test_perturbed_copies_are_not_kept_for_the_backward(structure):
    """With gradients an evaluation holds activations, and one copy, or none, of a weight."""
    width, depth = 256, 8
    torch.manual_seed(0)
    first = nn.Linear(width, width)
    layers = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(depth)])
    net, x = nn.Sequential(first, layers), torch.randn(2, width)
    zeroth = [*layers.parameters()]
    groups = [dict(params=zeroth, mode="zo", lr=1e-3), dict(params=first.parameters())]
    optimizer = HybridZOFO(
        groups, coupling=1.0, perturbation="streamed", structure=structure, backend="cpu"
    )
    optimizer.step(lambda: net(x).square().mean())  # and its checks
    optimizer.zero_grad()
    weight = 4 * width**2
    most = growth(lambda: optimizer.backward(lambda: net(x).square().mean())).most
    # gradients of the first layer, of this point and the mean; copies as they are made
    assert most < 5 * weight


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "0.1", True, None])
def test_refuses(value):
    with pytest.raises(ValueError, match=r"coupling must be a finite number >= 0, got"):
        HybridZOFO([nn.Parameter(torch.ones(2))], coupling=value)


def test_is_part_of_the_path():
    net = Net()
    saved = optimizer_of(net).state_dict()
    with pytest.warns(UserWarning, match=r"coupling=0\.3 \(here 0\.0\)"):
        optimizer_of(net, coupling=0.0).load_state_dict(saved)


def test_a_backward_in_a_backward_finds_the_perturbed_weights(monkeypatch):
    """Also where autograd runs it in a thread of its own, as on a GPU, which knows of no mode."""
    net, x = Net(), batch().requires_grad_()

    def inside(h):
        return checkpoint(net.inside, h, use_reentrant=True)

    def loss(again):
        h = torch.tanh(net.below(x))
        h = checkpoint(inside, h, use_reentrant=True) if again else net.inside(h)
        return net.above(h).square().mean()

    wanted = by_hand(net, lambda: loss(False), points_of("two_sided", 1), "full")
    optimizer = optimizer_of(net, perturbation="streamed")
    optimizer.backward(lambda: loss(True))
    assert_near([p.grad for p in net.split()[1]], wanted)
    inner = torch.utils.checkpoint.CheckpointFunction.backward

    def elsewhere(*args):
        around = _torch_compat._AROUND
        kept, around.mode = around.mode, None
        try:
            return inner(*args)
        finally:
            around.mode = kept

    monkeypatch.setattr(torch.utils.checkpoint.CheckpointFunction, "backward", elsewhere)
    optimizer.zero_grad()
    optimizer.backward(lambda: loss(True))
    assert_near([p.grad for p in net.split()[1]], wanted)


def test_torch_func_is_refused_where_copies_would_be_kept():
    net, x = Net(), batch()

    def loss():
        slope = torch.func.grad(lambda at: net(at).sum())(x)
        return net(x).square().mean() + slope.square().sum()

    optimizer = optimizer_of(net, perturbation="streamed")
    with pytest.raises(RuntimeError, match=r"must not use torch\.func where coupling > 0"):
        optimizer.backward(loss)
    optimizer_of(net, perturbation="streamed", coupling=0.0).backward(loss)
    optimizer_of(net, perturbation="in_place").backward(loss)


def test_graphs_of_displaced_points_are_let_go():
    net, x, graphs = Net(), batch(), []

    def closure():
        loss = net(x).square().mean()
        loss.backward(retain_graph=True)
        graphs.append(weakref.ref(loss))
        return loss

    returned = optimizer_of(net, num_samples=4).backward(closure)
    assert [g for g in graphs if g() is not None] == [graphs[0]]
    assert graphs[0]() is returned


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [None, 2])
@pytest.mark.parametrize(("perturbation", "structure"), MODES)
def test_on_a_gpu_as_on_the_cpu(perturbation, structure, bad):
    found = []
    for device in ("cpu", "cuda"):
        net, x, calls = Net().to(device), batch().to(device), []
        chosen = dict(perturbation=perturbation, structure=structure, backend="auto")
        optimizer = optimizer_of(net, distribution="rademacher", **chosen)

        def closure(net=net, x=x, calls=calls):
            calls.append(1)
            loss = net(x).square().mean()
            return loss * math.nan if len(calls) == bad else loss

        optimizer.backward(closure)
        found.append([p.grad.cpu() for p in net.split()[1]])
    assert_near(*found, error=1e-9)
