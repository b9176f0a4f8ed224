"""Side updates learn, in every way of perturbing, and go on from journals and files."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from quantized_models import batch, dequantised, layers, losses, network

from zofo_kernels import Direction, noise
from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, load_base_weights, replay
from zofo_optim.base_weights import save_base_weights
from zofo_optim.journal import JournalError
from zofo_optim.quantized.side_updates import add_side_updates, side_updates

ZO = dict(lr=1e-2, mu=1e-2)
WAYS = {
    "in place": {},
    "streamed": dict(perturbation="streamed"),
    "low rank": dict(structure="low_rank", perturbation="streamed"),
    "per example": dict(structure="low_rank", perturbation="streamed", directions="per_example"),
}


@pytest.mark.parametrize("way", WAYS)
def test_training_lowers_the_loss_and_leaves_the_weights_alone(way):
    model, x = network("nf4"), batch()
    weights = [layer.weight.detach().clone() for layer in layers(model)]
    groups = hybrid_param_groups(
        model,
        zo=ZO,
        quantized="low_rank",
        verbose=False,
        directions=WAYS[way].get("directions", "shared"),
    )
    optimizer = HybridZOFO(groups, **WAYS[way])
    assert [g["param_names"] for g in groups] == [
        ["0.side_update.left_seed_0", "2.side_update.left_seed_0"]
    ]

    def closure():
        each = losses(model, x)
        return each if way == "per example" else each.mean()

    before = closure().mean()
    for _ in range(40):
        optimizer.step(closure)
    assert closure().mean() < 0.9 * before
    for layer, weight in zip(layers(model), weights, strict=True):
        assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("way", ["in place", "streamed"])
def test_a_step_is_the_one_of_the_low_rank_direction_in_closed_form(way):
    """L <- L - lr c u, with c the slope of the loss along u V^T / sqrt(r) of both weights."""
    model, x = network("intx int4"), batch()
    sides = add_side_updates(model, rank=4)
    plain = [dequantised(layer).float() for layer in layers(model)]
    optimizer = HybridZOFO(
        hybrid_param_groups(model, zo=ZO, quantized="low_rank", verbose=False), seed=9, **WAYS[way]
    )
    directions = [
        noise(side.left.shape, Direction(9, 0, 0), index=i) for i, side in enumerate(sides.values())
    ]

    def loss(sign):
        moved = [
            w + sign * ZO["mu"] * u @ side.right.t()
            for w, u, side in zip(plain, directions, sides.values(), strict=True)
        ]
        return F.linear(F.linear(x, moved[0]).tanh(), moved[1]).square().mean()

    slope = (loss(1) - loss(-1)) / (2 * ZO["mu"])
    optimizer.step(lambda: losses(model, x).mean())
    for u, side in zip(directions, sides.values(), strict=True):
        torch.testing.assert_close(side.left.data, -ZO["lr"] * slope * u, rtol=2e-3, atol=1e-6)


def trained(way="in place", steps=5, journal=None):
    model, x = network("intx int4"), batch()
    groups = hybrid_param_groups(model, zo=ZO, quantized="low_rank", verbose=False)
    optimizer = HybridZOFO(groups, **WAYS[way])
    with nullcontext() if journal is None else Journal(journal).attach(optimizer):
        for _ in range(steps):
            optimizer.step(lambda: losses(model, x).mean())
    return model, optimizer


def test_a_journal_remakes_what_was_learnt(tmp_path):
    model, _ = trained(journal=tmp_path / "run.zofo")
    fresh = network("intx int4")
    add_side_updates(fresh)
    replay(fresh, tmp_path / "run.zofo")
    assert torch.equal(fresh(batch()), model(batch()))
    other = network("intx int4")
    add_side_updates(other, seed=1)
    with pytest.raises(JournalError, match="left_seed_0"):
        replay(other, tmp_path / "run.zofo")


def test_checkpoints_go_on_to_the_bit():
    whole, _ = trained(steps=6)
    model, optimizer = trained(steps=3)
    fresh = network("intx int4")
    groups = hybrid_param_groups(fresh, zo=ZO, quantized="low_rank", verbose=False)
    again = HybridZOFO(groups)
    for name, side in side_updates(fresh).items():
        side.load_state_dict(side_updates(model)[name].state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        again.step(lambda: losses(fresh, batch()).mean())
    assert torch.equal(fresh(batch()), whole(batch()))


def test_base_weights_hold_them(tmp_path):
    model, optimizer = trained()
    save_base_weights(optimizer, model, tmp_path)
    fresh = network("intx int4")
    with pytest.raises(ValueError, match="left_seed_0"):
        load_base_weights(fresh, tmp_path)
    add_side_updates(fresh)
    load_base_weights(fresh, tmp_path)
    assert torch.equal(fresh(batch()), model(batch()))
