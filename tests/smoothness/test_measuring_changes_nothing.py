"""Weights, gradients, buffers, generators and optimizers are as before; what is refused."""

import copy
import random
import sys

import numpy as np
import pytest
import torch
from conftest import same_bits
from torch import nn
from torch.nn import Parameter

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.smoothness import HessianProducts, largest_eigenvalue, measure_smoothness

METHODS = ("finite_difference", "exact", "forward")


def trained():
    """A model with dropout and batch norm, an optimizer with state, gradients, and a closure."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 1))
    model[0].requires_grad_(False)
    groups = hybrid_param_groups(
        model, zo=dict(lr=1e-3), fo=dict(lr=0.1, momentum=0.9), verbose=False
    )
    optimizer = HybridZOFO(groups)
    x = torch.randn(6, 4)

    def closure():
        return model(x).square().mean()

    optimizer.step(closure)
    return model, optimizer, closure


def snapshot(model, optimizer):
    return (
        copy.deepcopy(model.state_dict()),
        copy.deepcopy(optimizer.state_dict()),
        [(None if p.grad is None else p.grad.clone(), p.requires_grad) for p in model.parameters()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),  # noqa: NPY002
        torch.is_grad_enabled(),
    )


def check_same(before, after):
    assert all(map(same_bits, before[0].values(), after[0].values()))
    assert str(before[1]) == str(after[1])
    for (was, required), (now, requires) in zip(before[2], after[2], strict=True):
        assert required == requires
        assert (was is None and now is None) or same_bits(was, now)
    assert torch.equal(before[3], after[3])
    assert before[4] == after[4]
    assert (before[5] == after[5]).all()
    assert before[6] == after[6]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_changes(method):
    model, optimizer, closure = trained()
    before = snapshot(model, optimizer)
    options = dict(directions=3, method=method, largest=method != "forward")
    for target in (optimizer, model):
        first = measure_smoothness(target, closure, **options)
        check_same(before, snapshot(model, optimizer))
        assert measure_smoothness(target, closure, **options) == first  # dropout is the same


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("last", [1, 2, 5])
def test_a_closure_that_raises_leaves_all_as_it_was(method, last):
    model, optimizer, closure = trained()
    before, calls = snapshot(model, optimizer), []

    def failing():
        calls.append(1)
        if len(calls) == last:
            raise KeyError("no luck")
        return closure()

    def often():  # "exact" calls it twice
        for _ in range(9):
            measure_smoothness(optimizer, failing, directions=3, method=method, largest=False)

    with pytest.raises(KeyError, match="no luck"):
        often()
    check_same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("method", METHODS[:2])
def test_closures_may_go_back_themselves_and_clear_gradients(method):
    model, optimizer, closure = trained()

    def whole():
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        return loss

    options = dict(directions=3, method=method)
    right = measure_smoothness(optimizer, closure, **options)
    before = snapshot(model, optimizer)
    found = measure_smoothness(optimizer, whole, **options)
    check_same(before, snapshot(model, optimizer))
    for name in right:
        assert found[name].trace == pytest.approx(right[name].trace, rel=1e-3)


@pytest.mark.parametrize("goes_back", [False, True])
def test_parameters_that_are_not_measured_keep_their_gradients(goes_back):
    a, b, c = (Parameter(torch.ones(3)) for _ in range(3))
    gradient = b.grad = torch.full((3,), 7.0)

    def closure():
        loss = (a * b * c).square().sum()
        if goes_back:
            loss.backward()
        return loss

    measure_smoothness({"a": [a]}, closure, directions=2, largest=False)
    assert b.grad is gradient
    assert same_bits(gradient, torch.full((3,), 7.0))
    assert a.grad is None
    assert c.grad is None
    assert all(p.requires_grad for p in (a, b, c))


def test_losses_of_examples_are_averaged():
    x = Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    found = measure_smoothness({"x": x}, lambda: x.square(), directions=2, method="exact")
    assert found.loss == 2.5
    assert found["x"].trace == pytest.approx(2)


class TestRefusals:
    x = Parameter(torch.ones(2))

    def loss(self):
        return self.x.square().sum()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(by="name"), "by must be one of"),
            (dict(method="guess"), "method must be one of"),
            (dict(directions=1), "directions must be an int >= 2, got 1"),
            (dict(seed=-1), "seed must be an int >= 0, got -1"),
            (dict(step=0.0), "step must be a finite number > 0 or None, got 0.0"),
            (dict(step=float("nan")), "step must be a finite number > 0 or None, got nan"),
        ],
    )
    def test_of_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            measure_smoothness({"x": self.x}, self.loss, **options)

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (3, "target must be an optimizer, a list of parameter groups"),
            ({"x": torch.ones(2, dtype=torch.int64)}, "'x', of torch.int64"),
            ({"x": Parameter(torch.ones(2)) * 2}, "of torch.float32, with a graph"),
            ({"x": Parameter(torch.ones(2, dtype=torch.bfloat16))}, "torch.bfloat16 in 'x'"),
        ],
    )
    def test_of_targets(self, target, message):
        with pytest.raises(TypeError, match=message):
            measure_smoothness(target, self.loss)

    def test_of_targets_without_weights(self):
        for target in ({}, nn.ReLU(), []):
            with pytest.raises(ValueError, match="must hold a parameter of floating point"):
                measure_smoothness(target, self.loss)
        with pytest.raises(ValueError, match="on the meta device"):
            measure_smoothness({"x": Parameter(torch.ones(2, device="meta"))}, self.loss)

    @pytest.mark.parametrize("method", METHODS[:2])
    def test_of_closures(self, method):
        def measured(closure):
            measure_smoothness({"x": self.x}, closure, directions=2, method=method)

        with pytest.raises(TypeError, match="closure must be a function that returns the loss"):
            measured([])
        with pytest.raises(
            TypeError, match="closure must return the loss as a tensor with a graph"
        ):
            measured(lambda: self.loss().detach())
        with pytest.raises(ValueError, match="must return a scalar loss"):
            measured(lambda: torch.ones(2, 2))
        with pytest.raises(
            FloatingPointError, match="finite gradients, got one that is not, of 'x'"
        ):
            measured(lambda: self.loss() * float("nan"))
        scaler = torch.amp.GradScaler("cpu")
        with pytest.raises(ValueError, match="got one that a GradScaler scaled"):
            measured(lambda: scaler.scale(self.loss()) / 2)

    def test_of_losses_that_are_not_finite(self):
        with pytest.raises(FloatingPointError, match="finite losses"):
            measure_smoothness(
                {"x": self.x}, lambda: self.loss() / 0, directions=2, method="forward"
            )

    def test_without_scipy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
        with pytest.raises(ImportError, match="largest=True needs scipy"):
            measure_smoothness({"x": self.x}, self.loss)
        assert measure_smoothness({"x": self.x}, self.loss, largest=False)["x"].largest is None

    def test_of_eigenvalues_of_noise(self):
        x = Parameter(torch.ones(50, dtype=torch.float64))
        with HessianProducts({"x": x}, [lambda: x.sum()]) as products:
            noise = torch.Generator().manual_seed(0)
            products._product = products._difference = lambda v, *_: [
                torch.randn(50, generator=noise, dtype=torch.float64)
            ]
            with pytest.raises(RuntimeError, match="products are mostly rounding"):
                largest_eigenvalue(products)

    def test_of_eigenvalues_where_gradients_are_noise(self):
        """The rest is measured all the same."""
        x = Parameter(torch.ones(50, dtype=torch.float64))
        noise = torch.Generator().manual_seed(0)

        def closure():
            loss = x @ torch.randn(50, generator=noise, dtype=torch.float64)
            return loss - loss.detach()

        with pytest.warns(UserWarning, match="the largest eigenvalue of 'x'"):
            found = measure_smoothness({"x": x}, closure, directions=3)["x"]
        assert found.largest is None
        assert found.frobenius > 0


def test_sixteen_bits_go_exactly():
    x = Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    found = measure_smoothness({"x": x}, lambda: x.float().square().sum(), method="exact")
    assert found["x"].trace == pytest.approx(4, rel=1e-2)


def test_rounding_is_told():
    x = Parameter(torch.ones(50))
    options = dict(directions=10, method="forward", step=1e-6)
    with pytest.warns(UserWarning, match="largely the rounding of the loss"):
        measure_smoothness({"x": x}, lambda: x.square().sum(), **options)


def test_a_bar_is_shown(capsys):
    x = Parameter(torch.ones(5))
    measure_smoothness({"x": x}, lambda: x.square().sum(), directions=3, progress=True)
    assert "3/3" in capsys.readouterr().err
