"""The study of updates of quantised weights: grids, and what its ways do to a layer."""

import math

import pytest
import torch
from torch import nn

from experiments.quantized.rules import Layer, Way, all_displaced

pytest.importorskip("torchao", reason="the study needs torchao")

from experiments.quantized.grids import quantise, taken_apart


def layer_of(way, bits=4, sizes=(64, 16)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes, bias=False)).requires_grad_(False)
    quantise(model, bits, ["0"])
    grid = taken_apart(model, bits, ["0"])["0"]
    return model[0], grid, Layer(model[0], grid, way, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("per_example", [False, True])
@torch.no_grad()
def test_updates_go_along_the_displacement(per_example):
    """With one example of slope 1, an update of rate mu takes off what the displacement added."""
    module, _, layer = layer_of(Way(rank=4, redraw=0, per_example=per_example))
    x, mu = torch.randn(5, 64), 0.1
    before = module(x)
    layer.draw(0, 1)
    with all_displaced([layer], mu):
        displaced = module(x)
    assert torch.equal(module(x), before)
    layer.update(torch.ones(1), mu)
    torch.testing.assert_close(module(x), 2 * before - displaced)


@torch.no_grad()
def test_rounding_stays_on_the_grid_and_keeps_the_mean():
    _, grid, _ = layer_of(Way("rounded"))
    inside = grid.weight() * 0.9
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([grid.round(inside, generator) for _ in range(400)])
    steps = draws.view(400, *grid.integers.shape) / grid.scales
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    error = (draws.mean(0) - inside).abs().view(grid.integers.shape) / grid.scales
    assert error.max() < 5 * 0.5 / math.sqrt(400)  # the standard deviation is at most half a step


@torch.no_grad()
def test_folding_keeps_the_rank_below_its_cap():
    module, _, layer = layer_of(Way("folded", cap=8))
    base = module.weight.clone()
    for step in range(12):
        layer.draw(step, 1)
        layer.update(torch.ones(1), 0.1)
        assert torch.linalg.matrix_rank(module.weight - base, atol=1e-4) <= 8


@torch.no_grad()
def test_scales_move_in_units_of_their_size():
    _, grid, layer = layer_of(Way("scales"))
    before = grid.scales.clone()
    layer.draw(0, 1)
    layer.update(torch.ones(1), 0.01)
    moved = (grid.scales - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert 0.005 < moved < 0.02
