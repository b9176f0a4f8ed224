"""What SmoothnessRecorder warns of, and what it does not."""

import math
import warnings

import pytest
import torch
from recorded import Quadratic
from torch import nn

from zofo_optim import HybridZOFO
from zofo_optim.smoothness import SmoothnessRecorder


@pytest.mark.parametrize(("mode", "limit"), [("fo", 2 / 4.0), ("zo", 2 / 12.0)])
@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_warns_above_the_limit_alone(mode, limit, margin):
    for factor, warns in ((0.999, False), (1.001, True)):
        toy = Quadratic()
        rate = factor * (1 + margin) * limit
        recorder = SmoothnessRecorder(
            toy.optimizer(**{mode: rate}), directions=2, products=5, margin=margin, patience=3
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                recorder.measure(toy)
            assert caught == []
            for _ in range(3):
                recorder.measure(toy)
        assert len(caught) == warns
        if warns:
            said = str(caught[0].message)
            assert f"{rate:.2e}, is above {limit:.2e}" in said
            assert f"group {0 if mode == 'zo' else 1}" in said
            assert caught[0].filename == __file__


def test_one_measurement_between_starts_the_count_anew():
    toy = Quadratic()
    optimizer = toy.optimizer(fo=1.0)
    recorder = SmoothnessRecorder(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rate in (1.0, 0.1, 1.0, 0.1):
            optimizer.param_groups[1]["lr"] = rate
            assert recorder.measure(toy)["lr_fo"] == rate


def measured_in_turn(rates, curvatures, patience=2, load_at=None):
    """What is warned of along one parameter of these rates and curvatures."""
    y = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = HybridZOFO([dict(params=[y], lr=1.0)])
    recorder = SmoothnessRecorder(optimizer, directions=2, patience=patience)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for place, (rate, curvature) in enumerate(zip(rates, curvatures, strict=True)):
            optimizer.param_groups[0]["lr"] = rate
            if place == load_at:
                recorder.load_state_dict(recorder.state_dict())
            recorder.measure(lambda c=curvature: 10 + c * y.square().sum() / 2)
    return [str(one.message) for one in caught]


def test_a_measurement_without_a_limit_does_not_start_the_count_anew():
    """Where the loss curves downwards there is no limit, and the rates around it are as before."""
    assert measured_in_turn([1, 1], [4, -4]) == []
    (said,) = measured_in_turn([1, 1, 1], [4, -4, 4])
    assert "2 measurements in a row" in said
    assert measured_in_turn([1, 1, 1], [4, 1, 4]) == []
    assert measured_in_turn([1, 1], [4, 4], load_at=1) == []  # rows say nothing of single groups


def test_many_times_the_limit_is_warned_of_at_once():
    assert measured_in_turn([3.9 / 2], [4]) == []
    (said,) = measured_in_turn([4.1 / 2], [4])
    assert "group 0 (first-order), 2.05e+00, is above 5.00e-01" in said
    assert "(step 0, 4.1 times as much)" in said


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([1.0, 9.9], None),
        ([1.0, 10.1, 11.0], "the loss at step 1 is 10.1, 10.1 times that of the first row, 1"),
        ([1.0, math.nan, math.nan], "the loss at step 1 is not finite"),
        ([math.inf], "the loss at step 0 is not finite"),
        ([-1.0, 10.0], None),
    ],
)
def test_a_loss_that_has_grown_is_warned_of_once(losses, said):
    y = nn.Parameter(torch.ones(3, dtype=torch.float64))
    for maximize in (False, True):
        recorder = SmoothnessRecorder(HybridZOFO([dict(params=[y], lr=1e-9)], maximize=maximize))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step, loss in enumerate(losses):
                recorder.measure(lambda loss=loss: loss * y.sum() / 3, step=step)
        found = [str(one.message) for one in caught]
        expected = [] if said is None or (maximize and "times" in said) else [said]
        assert [one.partition(":")[0] for one in found] == expected


def test_each_group_is_warned_of():
    split = [dict(params=[nn.Parameter(torch.ones(k, dtype=torch.float64))]) for k in (3, 4)]

    def closure():
        y, z = (group["params"][0] for group in split)
        return 2 * y.square().sum() + 2 * z.square().sum()  # curvature 4

    rates = (0.7, 0.1)
    optimizer = HybridZOFO([{**g, "lr": lr} for g, lr in zip(split, rates, strict=True)])
    recorder = SmoothnessRecorder(optimizer, patience=1)
    with pytest.warns(UserWarning, match=r"group 0 \(first-order\), 7.00e-01, is above 5.00e-01"):
        recorder.measure(closure)
    optimizer.param_groups[1]["lr"] = 0.8
    with pytest.warns(UserWarning, match="group 1"):
        row = recorder.measure(closure)
    assert row["lr_fo"] == 0.8


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        (dict(fo_optimizer=torch.optim.Adam), "fo"),
        (dict(maximize=True), "fo"),
        (dict(maximize=True), "zo"),
        (dict(zo_rule="normalized"), "zo"),
        (dict(active=["x"]), "zo"),
    ],
)
def test_no_limit_is_said_where_none_is_known(options, mode):
    toy = Quadratic()
    named = [dict(params=[("x", toy.x)], lr=1e9, mode="zo"), dict(params=[("y", toy.y)], lr=1e9)]
    optimizer = HybridZOFO(named, **options)
    recorder = SmoothnessRecorder(optimizer, patience=1)
    other = "zo" if mode == "fo" else "fo"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the learning rate of group")
        warnings.filterwarnings("ignore", f".*{dict(zo='zeroth', fo='first')[other]}-order")
        row = recorder.measure(toy)
    assert row[f"stable_lr_{mode}"] is None
    assert row[f"lr_{mode}"] == 1e9
    assert row[f"smoothness_{mode}"] > 0


@pytest.mark.parametrize("method", ["finite_difference", "forward"])
def test_a_short_displacement_makes_no_false_alarm(method):
    """At the mu of 1e-6 that slopes allow, second differences in float32 are rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).requires_grad_(False)
    x, rows = torch.randn(32, 8), []

    def closure():
        return 3 + (model(x) - x[:, :1]).square().mean()

    for mu in (1e-2, 1e-6):
        groups = [dict(params=list(model.parameters()), lr=1e-2, mu=mu, mode="zo")]
        recorder = SmoothnessRecorder(HybridZOFO(groups), method=method)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rows.append([recorder.measure(closure) for _ in range(3)])
    for long, short in zip(*rows, strict=True):
        assert short["stable_lr_zo"] == pytest.approx(long["stable_lr_zo"], rel=0.2)
        assert short["trace_zo"] == pytest.approx(long["trace_zo"], rel=0.2)
    first, second, third = (row["evaluations"] for row in rows[1])
    assert first > 2 * second == 2 * third  # the displacement that was found is kept
