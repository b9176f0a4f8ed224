"""What a step warns of: once, by name, at the caller's line."""

import warnings

import pytest
import torch
from torch.nn import Parameter
from toys import ESTIMATORS, Toy, run, told

from zofo_optim import HybridZOFO


def test_warns_once_of_16_bit_losses():
    for mode, dtype, expected in (
        ("zo", torch.bfloat16, 1),
        ("hybrid", torch.float16, 1),
        ("fo", torch.bfloat16, 0),
        ("zo", torch.float32, 0),
    ):
        toy = Toy(torch.float32)
        optimizer = toy.optimizer(mode)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.zero_grad()
                optimizer.step(lambda toy=toy, dtype=dtype: (toy.loss() / 100).to(dtype))
        assert len(caught) == expected
        assert optimizer.last_loss.dtype == torch.float32  # differences are taken in it
        if expected:
            assert f"closure returned a loss of dtype {dtype}" in told(caught)[0]
            assert "float32" in told(caught)[0]


def test_warns_once_of_coupling_without_first_order_groups():
    optimizer = HybridZOFO(
        [Parameter(torch.ones(2))], mode="zo", lr=1e-3, coupling=0.1, backend="reference"
    )
    (x,) = optimizer.param_groups[0]["params"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(lambda: x.sum())
    (said,) = told(caught)
    assert "coupling=0.1 does nothing, as there is no group with mode='fo'" in said
    with pytest.warns(UserWarning, match="there is no group with mode='zo'"):
        HybridZOFO([y := Parameter(torch.ones(2))], coupling=0.1).step(lambda: y.sum())


def test_warns_once_of_frozen_parameters_in_first_order_groups():
    """As where a peft model's parameters are passed without hybrid_param_groups."""
    x, y = Parameter(torch.ones(2), requires_grad=False), Parameter(torch.ones(2))

    def warnings_of(groups):
        optimizer = HybridZOFO(groups, lr=1e-2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.step(lambda: (x * y).sum())
        return told(caught)

    (message,) = warnings_of([x, y])
    assert "1 of 2 first-order parameters have requires_grad=False" in message
    assert "hybrid_param_groups" in message
    assert warnings_of([y]) == []
    (message,) = (m for m in warnings_of([x]) if "first-order" in m)
    assert "1 of 1 first-order parameters" in message
    assert warnings_of([{"params": [x], "mode": "zo"}, {"params": [y]}]) == []


def test_warns_once_of_a_flat_loss_and_names_the_parameters():
    toy = Toy()
    unused = Parameter(torch.ones(3), requires_grad=False)
    for estimator in ESTIMATORS:
        for second in (False, True):
            groups = [("never.used", unused), ("nor.this", Parameter(torch.ones(1)))]
            toy.y.requires_grad_(True)
            optimizer = HybridZOFO(
                [
                    {"params": groups[: 1 + second], "mode": "zo", "lr": 1e-3},
                    {"params": [("y", toy.y)]},
                ],
                estimator=estimator,
            )
            groups[1][1].requires_grad_(False)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for step in range(12):
                    optimizer.zero_grad()
                    optimizer.step(toy)
                    assert len(caught) == (step >= 4)
            (message,) = told(caught)
            assert "bit-identical under perturbation for 5 steps" in message
            assert "never.used" in message
            assert ("nor.this" in message) == second


@pytest.mark.parametrize("size", [1.0, -1e14])
def test_a_flat_loss_that_is_huge_has_diverged(size):
    x = Parameter(torch.ones(3))
    optimizer = HybridZOFO([x], mode="zo", lr=1e-3)
    with pytest.warns(UserWarning, match="bit-identical") as caught:
        run(optimizer, lambda: size, 5)
    (message,) = told(caught)
    assert ("at 1.0e+14" in message) == (size != 1.0)
    assert ("has diverged (the learning rate" in message) == (size != 1.0)
    assert "mu is too small" in message


def test_unnamed_parameters_are_named_by_number_and_shape():
    x, y = Parameter(torch.ones(3, 2)), Parameter(torch.ones(5))
    optimizer = HybridZOFO([{"params": [x]}, {"params": [y]}], mode="zo", lr=1e-3)
    with pytest.warns(UserWarning, match=r"parameter 0 \(3, 2\), parameter 1 \(5,\)"):
        run(optimizer, lambda: 1.0, 5)


def test_no_warning_while_the_loss_moves():
    """Also not if it is flat now and then, or if slopes cancel around a minimum."""
    x = Parameter(torch.ones(3).double())
    optimizer = HybridZOFO([x], mode="zo", lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            run(optimizer, lambda: 1.0, 4)
            run(optimizer, lambda: x.sum(), 1)
        run(optimizer, lambda: x.sum(), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy = Toy()
        run(toy.optimizer("hybrid"), toy, 20)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_warns_once_of_losses_that_are_never_finite(estimator, loss):
    """And then does not say that the parameters do not reach the loss."""
    x = Parameter(torch.ones(3))
    optimizer = HybridZOFO([x], mode="zo", lr=1e-3, estimator=estimator)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(optimizer, lambda: x.sum() * loss, 19)
        run(optimizer, x.sum, 1)
        assert not caught
        run(optimizer, lambda: x.sum() * loss, 25)
    (message,) = told(caught)
    assert "no loss was finite for 20 steps" in message


def test_warns_once_of_a_loss_without_a_graph():
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(optimizer, lambda: toy.loss().item(), 3)
    assert len(caught) == 1
    assert "without a graph" in told(caught)[0]
    assert torch.equal(toy.y, Toy().y)
    assert not torch.equal(toy.x, Toy().x)


@pytest.mark.parametrize("phases", ["step", "backward"])
@pytest.mark.parametrize("topic", ["16-bit", "graph", "flat"])
def test_warnings_point_at_the_callers_line(topic, phases):
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    closure = {
        "16-bit": lambda: (toy.loss() / 100).bfloat16(),
        "graph": lambda: toy.loss().detach(),
        "flat": lambda: toy.y.sum(),
    }[topic]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            optimizer.zero_grad()
            getattr(optimizer, phases)(closure)
    assert {w.filename for w in caught} == {__file__}
