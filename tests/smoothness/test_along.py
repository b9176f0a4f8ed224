"""Slopes and curvatures along directions, against quadratics whose Hessians are known."""

import copy

import pytest
import torch
from conftest import same_bits
from torch import nn
from torch.nn import Parameter

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.smoothness import along_directions
from zofo_optim.smoothness.forward import curvature_mu, displacement

HESSIAN = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
SLOPE = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def quadratic(**options):
    """w'Hw / 2 + <g, w> at w = 0, and its optimizer."""
    w = Parameter(torch.zeros(3, dtype=torch.float64), False)
    optimizer = HybridZOFO([dict(params=[w], mode="zo", lr=1.0, mu=1e-2)], **options)
    return optimizer, lambda: w @ HESSIAN @ w / 2 + SLOPE @ w + 7


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_their_means_are_the_gradient_and_the_trace(distribution):
    """Within 4 standard errors."""
    optimizer, closure = quadratic(distribution=distribution)
    found = along_directions(optimizer, closure, directions=600)
    assert found.loss == 7
    assert found.slopes.shape == found.curvatures.shape == (600,)
    for values, right in ((found.slopes.square(), SLOPE.square().sum()), (found.curvatures, 8.0)):
        assert abs(values.mean() - right) < 4 * values.std() / 600**0.5


def test_signs_give_the_quadratic_form_itself():
    """The diagonal's sum, and twice what is beside it, with the signs' products."""
    optimizer, closure = quadratic(distribution="rademacher")
    found = along_directions(optimizer, closure, directions=50)
    forms = {8 + 2 * a - 2 * b for a in (1, -1) for b in (1, -1)}
    assert all(min(abs(c - form) for form in forms) < 1e-6 for c in found.curvatures.tolist())


def test_losses_of_examples_share_a_direction():
    w = Parameter(torch.zeros(2, 3, dtype=torch.float64), False)
    groups = [dict(params=[w], mode="zo", lr=1.0, mu=1e-2)]
    optimizer = HybridZOFO(
        groups, directions="per_example", structure="low_rank", perturbation="streamed"
    )
    scale = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    found = along_directions(optimizer, lambda: scale * w.square().sum(), directions=3)
    assert found.slopes.shape == found.curvatures.shape == (3, 3)
    torch.testing.assert_close(found.curvatures / scale, found.curvatures[:, :1].expand(3, 3))


def test_other_seeds_are_other_directions():
    optimizer, closure = quadratic()
    one, again, other = (along_directions(optimizer, closure, seed=s).slopes for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not (one == other).any()


def test_mu_may_be_another_one():
    """The slope of x^3 at 0 is mu^2 v^3."""
    x = Parameter(torch.zeros(1, dtype=torch.float64), False)
    optimizer = HybridZOFO([x], mode="zo", lr=1.0, mu=1e-2, distribution="rademacher")
    for mu in (None, 1e-2, 0.5):
        slopes = along_directions(optimizer, lambda: (x**3).sum(), directions=4, mu=mu).slopes
        wanted = torch.full((4,), (mu or 1e-2) ** 2, dtype=torch.float64)
        torch.testing.assert_close(slopes.abs(), wanted)
    assert optimizer.param_groups[0]["mu"] == 1e-2
    for mu in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mu must be a finite number > 0"):
            along_directions(optimizer, lambda: (x**3).sum(), mu=mu)


def test_nothing_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 1))
    model.requires_grad_(False)
    optimizer = HybridZOFO(hybrid_param_groups(model, dict(lr=1e-3), verbose=False))
    x = torch.randn(6, 4)
    before, state = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    random = torch.get_rng_state()
    along_directions(optimizer, lambda: model(x).square().mean(), directions=2)
    assert all(map(same_bits, before.values(), model.state_dict().values()))
    assert optimizer.state_dict() == state
    assert torch.equal(random, torch.get_rng_state())
    assert optimizer.last_loss is None


def test_what_it_refuses():
    optimizer, closure = quadratic()
    with pytest.raises(ValueError, match="directions must be an int >= 1, got 0"):
        along_directions(optimizer, closure, directions=0)
    with pytest.raises(ValueError, match="seed must be an int >= 0, got -1"):
        along_directions(optimizer, closure, seed=-1)
    one, two = (Parameter(torch.zeros(2)) for _ in range(2))
    groups = [dict(params=[p], mode="zo", lr=1.0, mu=mu) for p, mu in ((one, 0.1), (two, 0.2))]
    with pytest.raises(ValueError, match=r"one mu in all zeroth-order groups, got \[0.1, 0.2\]"):
        along_directions(HybridZOFO(groups), lambda: (one + two).sum())
    with pytest.raises(ValueError, match="must have a group with mode='zo'"):
        along_directions(HybridZOFO([one], lr=0.1), lambda: one.sum())


def bumpy(mu, dtype=torch.float32):
    """A loss of 300 weights with curvature, rounded as its type is."""
    draw = torch.Generator().manual_seed(0)
    w = Parameter((0.1 * torch.randn(300, generator=draw)).to(dtype), False)
    wave = torch.randn(300, generator=draw).to(dtype)
    optimizer = HybridZOFO([w], mode="zo", lr=1.0, mu=mu)
    return optimizer, lambda: (1 + w @ w + torch.sin(w @ wave)).float()


def test_curvature_has_a_displacement_of_its_own():
    """One that is long enough is kept; from shorter ones it grows to where noise is small."""
    right = along_directions(*bumpy(1e-3, torch.float64), directions=16).curvatures
    assert curvature_mu(*bumpy(1e-2)) == 1e-2
    for mu in (1e-5, 1e-7):
        optimizer, closure = bumpy(mu)
        found = displacement(optimizer, closure, 0)
        assert found.mu == curvature_mu(optimizer, closure) == curvature_mu(optimizer, closure)
        assert 1e-4 < found.mu < 1e-2
        assert 2e-8 < found.noise < 1e-6
        assert 1e-8 < found.least < 1e-6
        kept = along_directions(optimizer, closure, directions=16, mu=found.mu).curvatures
        assert (kept - right).square().mean().sqrt() < 0.1 * right.square().mean().sqrt()


def test_weights_of_16_bits_are_moved():
    """By several of their spacings, also where it is autocast that has 16 bits."""
    assert curvature_mu(*bumpy(1e-6, torch.bfloat16)) > 2.0**-9 * 0.1
    optimizer, _ = bumpy(1e-6)
    (w,) = optimizer.param_groups[0]["params"]

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.linear(w, w.view(1, -1)).float().sum()

    assert displacement(optimizer, closure, 0).least > 2.0**-9 * 0.1


def test_a_straight_loss_has_no_displacement_that_will_do():
    """The search ends at a tenth of the weights."""
    w = Parameter(torch.full((8,), 2.0), False)
    optimizer = HybridZOFO([w], mode="zo", lr=1.0, mu=1e-4)
    assert curvature_mu(optimizer, lambda: 1 + w.sum()) == pytest.approx(0.2)
