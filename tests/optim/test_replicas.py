"""The contract of replicas: points are shared out, and losses come together."""

import threading

import torch
from torch.nn import Parameter

from zofo_optim import HybridZOFO
from zofo_optim.estimators import ESTIMATORS
from zofo_optim.replicas import Gathered, OneProcess


def problem():
    w = Parameter(torch.linspace(0.5, 1.5, 7, dtype=torch.float64), False)
    group = dict(params=[w], mode="zo", lr=1e-2, mu=1e-2)
    optimizer = HybridZOFO([group], num_samples=2, perturbation="streamed", seed=3)
    return optimizer, w


def test_one_process_evaluates_everything():
    optimizer, _ = problem()
    replicas = optimizer.replicas
    assert isinstance(replicas, OneProcess)
    points = ESTIMATORS["two_sided"].points(2, first_order=True)
    losses = torch.arange(5.0)
    assert replicas.mine(points) == points
    found = replicas.gather(points, losses)
    assert found.points is points
    assert found.losses is losses
    assert found.differences.tolist() == [-0.5, -0.5]
    assert replicas.agree(True)
    assert not replicas.agree(False)


class Half(OneProcess):
    """One of two threads that each evaluate one sample."""

    def __init__(self, settings, rank, found, barrier):
        super().__init__(settings)
        self.part, self.found, self.barrier = rank, found, barrier

    def mine(self, points):
        self.own = [place for place, point in enumerate(points) if point.sample == self.part]
        return [points[place] for place in self.own]

    def gather(self, points, losses, share=None):
        self.found[self.part] = dict(zip(self.own, losses, strict=True))
        self.barrier.wait(60)
        every = {**self.found[0], **self.found[1]}
        self.barrier.wait(60)
        return super().gather(points, torch.stack([every[place] for place in range(len(points))]))


def test_two_that_share_the_samples_do_the_step_of_one():
    found, barrier, calls, weights = {}, threading.Barrier(2), [0, 0], {}

    def train(rank):
        optimizer, w = problem()
        optimizer._replicas = Half(optimizer.settings, rank, found, barrier)

        def closure():
            calls[rank] += 1
            return (w**3).sum()

        for _ in range(3):
            optimizer.step(closure)
        weights[rank] = w.detach().clone()

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)

    optimizer, w = problem()
    for _ in range(3):
        optimizer.step(lambda: (w**3).sum())
    assert torch.equal(weights[0], w.detach())
    assert torch.equal(weights[1], w.detach())
    assert calls == [3 * 2 + 2] * 2  # two points a step each, and the first step's verification


class LaterPoints(OneProcess):
    """Evaluates the unperturbed point and the last one; the others' losses come from elsewhere."""

    def mine(self, points):
        return [points[0], points[-1]]

    def gather(self, points, losses, share=None):
        losses = torch.cat([losses[:1], losses[-1:].expand(len(points) - 1)])
        found = super().gather(points, losses)
        return Gathered(points, losses, found.differences)


def test_a_process_returns_its_own_unperturbed_loss():
    w = Parameter(torch.linspace(0.5, 1.5, 7), False)
    y = Parameter(torch.ones(()))
    groups = [dict(params=[w], mode="zo", lr=1e-2, mu=1e-1), dict(params=[y], lr=1e-2)]
    optimizer = HybridZOFO(groups, num_samples=3, seed=3)
    optimizer._replicas = LaterPoints(optimizer.settings)
    clean = float((w**3).sum())
    returned = optimizer.backward(lambda: (w**3).sum() * y)
    assert abs(float(returned) - clean) < 1e-5
    assert y.grad is not None
    assert optimizer.projected_grads.shape == (1, 3)
