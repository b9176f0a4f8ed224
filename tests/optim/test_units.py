"""``unit``: weights are ``unit`` theta; mu and lr count in theta."""

import pytest
import torch

from zofo_optim import HybridZOFO

OPTIONS = [
    dict(),
    dict(estimator="one_sided", num_samples=3),
    dict(perturbation="streamed", structure="low_rank"),
    dict(zo_rule="clip", num_samples=2),
    dict(maximize=True, weight_decay=0.25),
]


def _path(unit, options, steps=4):
    """Weights over ``unit`` after some steps on a function of that quotient, and losses."""
    torch.manual_seed(0)
    theta = torch.randn(6, 5)
    weight = torch.nn.Parameter(theta * unit, requires_grad=False)
    inputs = torch.randn(3, 5)
    group = dict(params=[weight], mode="zo", lr=0.01, mu=2.0**-7)
    if unit != 1.0:
        group["unit"] = unit
    optimizer = HybridZOFO([group], seed=5, **options)
    losses = []
    for _ in range(steps):
        loss = optimizer.step(
            lambda: torch.nn.functional.linear(inputs / unit, weight).tanh().square().sum()
        )
        losses.append(loss.item())
    return weight.detach() / unit, losses, optimizer


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("unit", [2.0**-6, 8.0])
def test_the_path_is_that_of_theta(options, unit):
    """To the bit, as powers of two round nothing."""
    theta, losses, _ = _path(1.0, options)
    same, again, optimizer = _path(unit, options)
    assert losses == again
    torch.testing.assert_close(same, theta, rtol=0, atol=0)
    assert optimizer.projected_grads.isfinite().all()


def test_a_unit_goes_with_the_state():
    _, _, optimizer = _path(0.5, {})
    other = _path(0.25, {})[2]
    other.load_state_dict(optimizer.state_dict())
    assert other.zo_groups()[0].unit == 0.5


@pytest.mark.parametrize("unit", [0.0, -1.0, float("inf"), float("nan"), "1", True])
def test_bad_units(unit):
    weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match="unit"):
        HybridZOFO([dict(params=[weight], mode="zo", lr=0.1, unit=unit)])


def test_first_order_groups_have_none():
    with pytest.raises(TypeError, match="'unit' is no option of a group with mode='fo'"):
        HybridZOFO([dict(params=[torch.nn.Parameter(torch.ones(2))], lr=0.1, unit=0.5)])
