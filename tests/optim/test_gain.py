"""per_example_gain against gradients that are known; and that it changes nothing."""

import copy

import pytest
import torch
from conftest import same_bits
from torch import nn
from torch.nn import Parameter

from zofo_optim import HybridZOFO, hybrid_param_groups, per_example_gain

GRADIENTS = torch.tensor([[3.0, 1.0, 0.0], [2.0, -1.0, 1.0], [1.0, 0.0, 2.0]], dtype=torch.float64)


def linear():
    """Losses <g_b, w>, and their optimizer."""
    w = Parameter(torch.ones(3, dtype=torch.float64), False)
    optimizer = HybridZOFO([("w", w)], mode="zo", lr=1.0, mu=1e-2)
    return w, optimizer, lambda: GRADIENTS @ w


def test_it_is_the_ratio_of_the_gradients():
    """B ||mean g||^2 / mean ||g_b||^2, within 4 of its own standard errors."""
    _, optimizer, losses = linear()
    found = per_example_gain(optimizer, losses, directions=1500)
    mean = GRADIENTS.mean(0).square().sum()
    right = 3 * (mean / GRADIENTS.square().sum(1).mean()).item()
    assert found.examples == 3
    assert 0 < found.standard_error < 0.1 * right
    assert abs(found.gain - right) < 4 * found.standard_error


def test_its_error_falls_with_the_directions():
    _, optimizer, losses = linear()
    few, many = (per_example_gain(optimizer, losses, directions=n) for n in (100, 1600))
    assert 2.5 < few.standard_error / many.standard_error < 6.5


def test_it_changes_no_weight_no_buffer_and_no_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    model.requires_grad_(False)
    groups = hybrid_param_groups(model, dict(lr=1e-3), verbose=False)
    optimizer = HybridZOFO(groups, structure="low_rank", perturbation="streamed")
    x = torch.randn(6, 4)
    before, state = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    for _ in range(2):
        per_example_gain(optimizer, lambda: model(x).square().mean(1), directions=2)
        assert all(map(same_bits, before.values(), model.state_dict().values()))
        assert optimizer.state_dict() == state
    assert optimizer.last_loss is None


def test_it_is_of_what_moves():
    """One parameter has gradients that agree, the other ones that cancel."""
    same, apart = (Parameter(torch.zeros(2, dtype=torch.float64), False) for _ in range(2))
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def losses():
        return same.sum().expand(2) + signs * apart.sum()

    found = {}
    for active in ("same", "apart"):
        params = [("same", same), ("apart", apart)]
        optimizer = HybridZOFO(params, mode="zo", lr=1.0, active=active)
        found[active] = per_example_gain(optimizer, losses).gain
    assert found["same"] == pytest.approx(2, abs=1e-6)
    assert found["apart"] == pytest.approx(0, abs=1e-6)


def test_what_cannot_be():
    w, optimizer, losses = linear()
    for directions in (1, True, 2.5):
        with pytest.raises(ValueError, match="directions must be an int >= 2"):
            per_example_gain(optimizer, losses, directions=directions)
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        per_example_gain(optimizer, lambda: losses()[:1])
    with pytest.raises(ValueError, match="shape"):
        per_example_gain(optimizer, lambda: losses().mean())
    with pytest.raises(ValueError, match="must have a group with mode='zo'"):
        per_example_gain(HybridZOFO([Parameter(torch.ones(1))], lr=1.0), losses)
    with pytest.raises(RuntimeError, match="must not be called inside a closure"):
        optimizer.step(lambda: per_example_gain(optimizer, losses))
    torch.testing.assert_close(w.detach(), torch.ones_like(w), rtol=0, atol=1e-15)
