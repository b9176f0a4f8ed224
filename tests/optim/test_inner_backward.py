"""Closures that call backward for something else than their loss, and those that do so for it."""

import warnings

import pytest
import torch
from conftest import each_of
from torch.nn import Parameter

from zofo_optim import HybridZOFO
from zofo_optim.evaluation import evaluate

perturbation = each_of(["in_place", "streamed"])


class Problem:
    """A frozen base x, an adapter y, and h, which the closures differentiate by."""

    def __init__(self):
        self.x = Parameter(torch.linspace(0.5, 1.0, 4, dtype=torch.float64), requires_grad=False)
        self.y = Parameter(torch.linspace(1.0, 2.0, 4, dtype=torch.float64))
        self.h = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64).requires_grad_()

    def features(self):
        return (self.x * self.y).tanh()

    def optimizer(self, **options):
        zo = dict(params=[self.x], mode="zo", lr=1e-2)
        return HybridZOFO([zo, dict(params=[self.y], lr=1e-2)], **options)

    def values(self):
        return [self.x.detach().clone(), self.y.detach().clone()]


def own_styles(p):
    """Name -> closure that leaves the gradients of the loss that it returns."""

    def returned():
        loss = p.features().square().sum()
        loss.backward()
        return loss

    def scaled():
        loss = p.features().square().sum()
        (loss * 1.0).backward()
        return loss

    def from_its_parts():
        first, second = p.features().square().sum() / 2, p.features().square().sum() / 2
        first.backward()
        second.backward()
        return first + second

    def summed():
        first, second = p.features().square().sum() / 2, p.features().square().sum() / 2
        torch.autograd.backward([first, second])
        return first + second

    def without_graph():
        loss = p.features().square().sum()
        loss.backward()
        return loss.item()

    def by_an_edge():
        loss = p.features().square().sum()
        torch.autograd.backward(loss * 1.0, inputs=[p.y])
        return loss

    return [f for name, f in locals().items() if name != "p"]


OWN = [f.__name__ for f in own_styles(None)]


@pytest.mark.parametrize("style", range(len(OWN)), ids=OWN)
def test_backward_for_the_loss_is_the_closures_own(style, perturbation):
    plain, other = Problem(), Problem()
    for p, closure in ((plain, lambda: plain.features().square().sum()), (other, None)):
        optimizer = p.optimizer(perturbation=perturbation)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(closure or own_styles(p)[style])
    torch.testing.assert_close(other.values(), plain.values(), rtol=0, atol=1e-13)
    assert not torch.equal(plain.y, Problem().y)


def gradient_by_h(p):
    """What an inner backward leaves in ``h.grad``; it depends on x."""
    p.h.grad = None
    (p.h * p.x).square().sum().backward()
    return p.h.grad


def inner_styles(p):
    """Name -> closure with an inner backward, and the loss that it stands for."""

    def of_a_leaf():
        return (p.features() * gradient_by_h(p)).sum()

    def through_shared_parameters():
        """As adversarial training does: both graphs end in the same parameters."""
        p.h.grad = None
        (p.h * p.features()).square().sum().backward()
        p.y.grad = None
        return (p.features() * (p.h + 0.1 * p.h.grad).detach()).sum()

    def then_its_own():
        loss = (p.features() * gradient_by_h(p)).sum()
        loss.backward()
        return loss

    def several():
        first = gradient_by_h(p).clone()
        return (p.features() * (first + gradient_by_h(p)) / 2).sum()

    return [f for name, f in locals().items() if name != "p"]


def adversarial(p):
    return (p.features() * (p.h + 0.2 * p.h * p.features() ** 2).detach()).sum()


def penalised(p):
    return (p.features() * 2 * p.h.detach() * p.x**2).sum()


INNER = [f.__name__ for f in inner_styles(None)]
MEANT = [penalised, adversarial, penalised, penalised]


@pytest.mark.parametrize("style", range(len(INNER)), ids=INNER)
@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
def test_inner_backward_leaves_both_estimates_right(style, estimator, perturbation):
    meant, found = Problem(), Problem()
    options = dict(perturbation=perturbation, estimator=estimator, num_samples=2)
    expected, optimizer = meant.optimizer(**options), found.optimizer(**options)
    closure = inner_styles(found)[style]
    for _ in range(3):
        expected.zero_grad()
        expected.step(lambda: MEANT[style](meant))
        optimizer.zero_grad()
        optimizer.step(closure)
        torch.testing.assert_close(found.y.grad, meant.y.grad, rtol=0, atol=1e-12)
        slopes = expected.projected_grads
        torch.testing.assert_close(optimizer.projected_grads, slopes, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.values(), meant.values(), rtol=0, atol=1e-12)
    assert meant.y.grad.abs().min() > 0
    assert slopes.abs().min() > 0


def test_inner_backward_leaves_no_gradients_of_other_evaluations():
    p = Problem()
    idle = Parameter(torch.ones(2, dtype=torch.float64))
    zo = dict(params=[p.x], mode="zo", lr=1e-2)
    optimizer = HybridZOFO([zo, dict(params=[p.y, idle], lr=1e-2)])
    calls = []

    def closure():
        calls.append(1)
        if len(calls) > 1:
            idle.sum().backward()
        else:
            p.h.sum().backward()
        return (p.features() * p.h.detach()).sum()

    optimizer.backward(closure)
    assert len(calls) == 3 + 1  # the first step evaluates once more
    assert idle.grad is None
    assert p.y.grad is not None


@pytest.mark.parametrize("gradients", [True, False])
def test_inner_calls_are_told(gradients):
    p = Problem()
    for style, wanted in zip(inner_styles(p), [{0}, {0}, {0}, {0, 1}], strict=True):
        found = evaluate(style, gradients=True)
        assert found.inner == wanted
        assert found.backpropagated
        if not gradients:
            again = evaluate(style, gradients=False, inner=found.inner)
            assert torch.equal(again.loss, found.loss)
            assert not again.loss.requires_grad
            assert again.inner == wanted
    for style in own_styles(p):
        assert evaluate(style, gradients=True).inner == frozenset()


def test_a_leaf_as_loss():
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    v = torch.ones((), dtype=torch.float64, requires_grad=True)

    def own():
        w.backward()
        return w

    def inner():
        (v * 2).backward()
        return w

    for closure, calls in ((own, set()), (inner, {0})):
        w.grad = None
        assert evaluate(closure, gradients=True).inner == calls
        assert w.grad == 1


@pytest.mark.parametrize("cleared", [False, True])
def test_a_loss_that_is_computed_again_is_warned_of(cleared):
    """Its gradients are added to those of the first; nothing tells that it is the same loss."""
    x, y = torch.nn.Parameter(torch.ones(3), False), torch.nn.Parameter(torch.ones(3))
    optimizer = HybridZOFO([{"params": [x], "mode": "zo", "lr": 1e-3}, {"params": [y]}], lr=0.1)

    def closure():
        (x * y).square().sum().backward()
        if cleared:
            y.grad = None
        return (x * y).square().sum()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.step(closure)
    told = [str(w.message) for w in caught if "left gradients" in str(w.message)]
    assert len(told) == (0 if cleared else 1)
