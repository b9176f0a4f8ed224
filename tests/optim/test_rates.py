"""Learning rates between steps: those that a schedule rounds below 0, and those that are wrong."""

import math

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD
from torch.optim import lr_scheduler as schedules

from zofo_optim import HybridZOFO, Journal, replay

START, END = 1 / 3, 0.0


def last_rates(total):
    """What LinearLR leaves at the end, by torch's own optimizer."""
    optimizer = SGD([Parameter(torch.ones(1))], lr=1e-3)
    schedule = schedules.LinearLR(optimizer, START, END, total_iters=total)
    for _ in range(total):
        optimizer.step()
        schedule.step()
    return optimizer.param_groups[0]["lr"]


BELOW = [total for total in range(2, 110) if last_rates(total) < 0]


def test_some_schedules_do_round_below_zero():
    assert len(BELOW) > 5


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("total", [BELOW[0], BELOW[-1]])
def test_a_schedule_that_rounds_below_zero(total, hybrid, perturbation):
    x, y = torch.ones(3), Parameter(torch.ones(3))
    groups = [{"params": [x], "mode": "zo", "lr": 1e-3}, {"params": [y], "lr": 1e-3}]
    optimizer = HybridZOFO(groups[: 1 + hybrid], perturbation=perturbation, weight_decay=0.1)
    schedule = schedules.LinearLR(optimizer, START, END, total_iters=total)
    for _ in range(total):
        optimizer.step(lambda: (x * y).sum())
        schedule.step()
    assert optimizer.param_groups[0]["lr"] < 0
    moved, before = x.clone(), y.detach().clone()
    optimizer.step(lambda: (x * y).sum())
    torch.testing.assert_close(x, moved, rtol=0, atol=1e-6)  # in place rounds, no more
    torch.testing.assert_close(y.detach(), before, rtol=0, atol=1e-6)
    assert optimizer.param_groups[0]["zo_step"] == total + 1
    assert optimizer.state_dict()["param_groups"][0]["lr"] < 0
    again = HybridZOFO([dict(group) for group in optimizer.param_groups])  # as when resuming
    again.step(lambda: (x * y).sum())


def test_it_counts_as_zero():
    """An update of rate 0, whatever the coefficient: no ascent, no decay."""
    updates = []
    for rate in (-1e-19, 0.0):
        w = torch.full((1000,), 1.0, dtype=torch.float64)
        optimizer = HybridZOFO([w], lr=1e-3, mode="zo", weight_decay=0.5, perturbation="streamed")
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step(lambda w=w: 1e12 * w.sum())
        updates.append(w)
    assert torch.equal(*updates)
    assert (updates[0] == 1).all()


def test_a_journal_records_it(tmp_path):
    w = torch.ones(3)
    base = {"w": w.clone()}
    optimizer = HybridZOFO([("w", w)], lr=1e-3, mode="zo", distribution="rademacher")
    with Journal(tmp_path / "run.zofo").attach(optimizer):
        for rate in (1e-3, -1e-19):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step(lambda: w.square().sum())
    assert replay(base, tmp_path / "run.zofo").verified
    assert torch.equal(base["w"], w)


@pytest.mark.parametrize("rate", [math.nan, -math.nan, math.inf, -math.inf, -1e-3, -1e-8])
@pytest.mark.parametrize("scheduled", [False, True])
def test_rates_that_are_wrong_raise(rate, scheduled):
    w = torch.ones(3)
    optimizer = HybridZOFO([w], lr=1e-3, mode="zo")
    if scheduled:
        schedules.StepLR(optimizer, 10)
    optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(ValueError, match=f"Invalid learning rate: {rate}"):
        optimizer.step(lambda: w.sum())
    assert (w == 1).all()


@pytest.mark.parametrize("rate", [-1e-19, torch.tensor(-1e-19), -0.1])
def test_construction_takes_none_below_zero(rate):
    with pytest.raises(ValueError, match="Invalid learning rate"):
        HybridZOFO([torch.ones(3)], lr=rate, mode="zo")
    with pytest.raises(ValueError, match="Invalid learning rate"):
        HybridZOFO([{"params": [torch.ones(3)], "lr": rate, "mode": "zo"}])
