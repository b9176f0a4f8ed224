"""What a closure may do, and what it must not."""

import pytest
import torch
from torch.nn import Parameter
from toys import ESTIMATORS, MODES, Net, Toy, assert_restored, equal, evaluations

from zofo_kernels import Direction, noise
from zofo_optim import HybridZOFO


def closure_styles(net, optimizer):
    def documented():
        optimizer.zero_grad()
        loss = net()
        loss.backward()
        return loss

    def model_zero_grad():
        net.zero_grad()
        loss = net()
        loss.backward()
        return loss

    def in_place_zero_grad():
        net.zero_grad(set_to_none=False)
        loss = net()
        loss.backward()
        return loss

    def functional_backward():
        optimizer.zero_grad()
        loss = net()
        torch.autograd.backward(loss)
        return loss.item()

    def backward_with_arguments():
        optimizer.zero_grad()
        loss = net()
        loss.backward(torch.ones_like(loss), retain_graph=True)
        return loss.detach()

    def two_losses():
        optimizer.zero_grad()
        loss = net()
        parts = [loss * 0.25, loss * 0.75]
        torch.autograd.backward(parts)
        return sum(parts)

    def re_enables_gradients():
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = net()
            loss.backward()
        return loss

    return [f for name, f in locals().items() if name not in ("net", "optimizer")]


STYLES = [
    "documented",
    "model_zero_grad",
    "in_place_zero_grad",
    "functional_backward",
    "backward_with_arguments",
    "two_losses",
    "re_enables_gradients",
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("style", range(len(STYLES)), ids=STYLES)
def test_closure_styles_are_the_same(style, estimator):
    plain, net = Net(), Net()
    expected = plain.optimizer(estimator=estimator, num_samples=2)
    optimizer = net.optimizer(estimator=estimator, num_samples=2)
    closure = closure_styles(net, optimizer)[style]
    for _ in range(4):
        expected.zero_grad()
        expected.step(plain)
        optimizer.step(closure)
        assert net.base.weight.grad is None
        torch.testing.assert_close(net.values(), plain.values(), rtol=0, atol=1e-13)
    assert not equal(net.values(), Net().values())
    gradients, wanted = ([p.grad for p in m.head.parameters()] for m in (net, plain))
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-13)
    assert all(g.abs().max() > 0 for g in gradients)


def test_gradient_tensors_stay_the_same_objects():
    """A view of .grad that a user holds is not replaced by the repeated evaluations."""
    net = Net()
    optimizer = net.optimizer()
    optimizer.step(net)
    held = net.head.weight.grad

    def closure():
        net.zero_grad(set_to_none=False)
        loss = net()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert net.head.weight.grad is held
    assert held.abs().max() > 0


def test_zero_grad_is_ignored_in_repeated_evaluations():
    """Whatever was accumulated before stays, although the repetitions run zero_grad again."""
    toy, plain = Toy(), Toy()
    for one in (toy, plain):
        optimizer = one.optimizer("hybrid", estimator="one_sided", num_samples=2)
        optimizer.backward(one)
        one.calls = 0

        def closure(one=one, optimizer=optimizer):
            loss = one()
            if one is toy and one.calls > 1:
                optimizer.zero_grad()
                optimizer.zero_grad(set_to_none=False)
            return loss

        optimizer.step(closure)
        assert one.y.grad is not None
    assert equal(toy.values(), plain.values())
    single = Toy()
    single.optimizer("hybrid", estimator="one_sided", num_samples=2).step(single)
    assert not torch.allclose(toy.x, single.x, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", ["step", "backward"])
def test_a_closure_must_not_step_the_optimizer(mode, call):
    for k in range(1, evaluations(mode, "two_sided", 1) + 1):
        toy = Toy()
        optimizer = toy.optimizer(mode)
        before = toy.values()

        def closure(toy=toy, optimizer=optimizer, k=k):
            loss = toy()
            if toy.calls == k:
                getattr(optimizer, call)(toy.loss)
            return loss

        with pytest.raises(RuntimeError, match="must not step the optimizer that is evaluating"):
            optimizer.step(closure)
        assert_restored(toy, before, mode)
        toy.calls = -99
        optimizer.zero_grad()
        optimizer.step(closure)  # usable afterwards
        assert not equal(toy.values(), before)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loss_may_live_in_memory_that_the_next_evaluation_overwrites(estimator):
    """A view of a weight, a buffer of the model, the static output of a captured graph."""
    x = Parameter(torch.tensor([1.5, 1.25], dtype=torch.float64), requires_grad=False)
    buffer = torch.zeros((), dtype=torch.float64)
    closures = (lambda: x[0] * 1, lambda: x[0], lambda: buffer.copy_(x[0]))
    slopes = []
    for closure in closures:
        optimizer = HybridZOFO([x], mode="zo", lr=0.0, estimator=estimator)
        optimizer.step(closure)
        slopes.append(optimizer.projected_grads.item())
    z = noise((2,), Direction(0, 0, 0), dtype=torch.float64)
    assert slopes == pytest.approx(3 * [z[0].item()], rel=1e-9)


def test_a_closure_may_step_another_optimizer():
    """Two players, each with an optimizer of its own."""
    toy, other = Toy(), Toy()
    inner, optimizer = other.optimizer("zo"), toy.optimizer("zo")

    def closure():
        inner.step(other)
        return toy()

    optimizer.step(closure)
    assert other.calls == 3 + 2 + 2  # three evaluations, of which the first is inner's first step
    alone = Toy()
    alone.optimizer("zo").step(alone)
    assert equal(toy.values(), alone.values())
