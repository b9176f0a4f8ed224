"""Smoothness along a run: closed forms on quadratics, and runs that are not changed."""

import csv
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import same_bits
from recorded import Quadratic
from torch import nn

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.smoothness import SmoothnessRecorder

METHODS = ("finite_difference", "exact", "forward")


@pytest.mark.parametrize("method", METHODS)
def test_a_quadratic_is_known(method):
    """Directions of signs give tr A exactly, and with A = h I the limit 2 / tr A too."""
    toy = Quadratic()
    optimizer = toy.optimizer(momentum=0.9)
    recorder = SmoothnessRecorder(optimizer, directions=40, method=method)
    row = recorder.measure(toy)
    assert recorder.rows == [row]
    gradient = toy.B @ toy.y.detach() + 0.1 * toy.x[:5]
    assert row["loss"] == pytest.approx(toy().item())
    assert row["gradient_norm_fo"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert row["largest_fo"] == pytest.approx(4.0, rel=1e-4)
    assert row["smoothness_fo"] == pytest.approx(4.0, rel=1e-4)
    assert row["stable_lr_fo"] == pytest.approx(2 * 1.9 / 4.0, rel=1e-4)
    assert abs(row["trace_fo"] - 3.5) < 4 * row["trace_error_fo"]
    assert abs(row["frobenius_fo"] - toy.B.norm().item()) < 4 * row["frobenius_error_fo"]
    gradient = toy.A @ toy.x + 0.1 * torch.cat([toy.y.detach(), torch.zeros(19)])
    assert row["gradient_norm_zo"] == pytest.approx(gradient.norm().item(), rel=0.5)
    assert row["trace_zo"] == pytest.approx(12.0, rel=1e-4)
    assert row["stable_lr_zo"] == pytest.approx(2 / 12.0, rel=1e-4)
    assert (row["lr_zo"], row["lr_fo"]) == (1e-3, 1e-2)
    assert row["lambda_max_fo"] == pytest.approx(4.0, rel=1e-4)
    assert row["lambda_min_fo"] == pytest.approx(-2.0, rel=1e-4)
    if method == "forward":
        assert row["frobenius_zo"] is row["frobenius_error_zo"] is None  # signs do not tell it
        assert row["lambda_max_zo"] is None
    else:
        assert row["gradient_norm_zo"] == pytest.approx(gradient.norm().item(), rel=1e-5)
        assert row["largest_zo"] == pytest.approx(0.5, rel=1e-4)
        assert row["smoothness_zo"] == pytest.approx(0.5, rel=1e-4)


def test_a_negative_extreme_is_no_limit():
    toy = Quadratic()
    toy.B = -toy.B
    row = SmoothnessRecorder(toy.optimizer()).measure(toy)
    assert row["largest_fo"] == row["lambda_min_fo"] == pytest.approx(-4.0, rel=1e-4)
    assert row["smoothness_fo"] == -row["largest_fo"]
    assert row["lambda_max_fo"] == pytest.approx(2.0, rel=1e-4)
    assert row["stable_lr_fo"] == pytest.approx(1.0, rel=1e-4)


def test_limits_know_the_estimator():
    """The loss is back-propagated 1 + coupling times; 5 directions of signs are in a step."""
    toy = Quadratic()
    optimizer = toy.optimizer(estimator="one_sided", coupling=0.5, num_samples=5)
    row = SmoothnessRecorder(optimizer).measure(toy)
    assert row["stable_lr_fo"] == pytest.approx(2 / (1.5 * 4), rel=1e-4)
    assert row["stable_lr_zo"] == pytest.approx(2 / (0.5 * (24 / 5 + 4 / 5)), rel=1e-4)
    alone = toy.optimizer(estimator="one_sided", coupling=0.5, modes=("fo",))
    row = SmoothnessRecorder(alone).measure(toy)
    assert row["stable_lr_fo"] == pytest.approx(2 / 4, rel=1e-4)


def test_measurements_go_on_with_lanczos_s_method():
    h = torch.linspace(-1, 1, 300, dtype=torch.float64)
    h[-1] = 3.0
    y = nn.Parameter(torch.ones(300, dtype=torch.float64))
    optimizer = HybridZOFO([dict(params=[y], lr=1e-3)])

    def found(seed, times):
        recorder = SmoothnessRecorder(optimizer, products=3, directions=2, seed=seed)
        for _ in range(times):
            row = recorder.measure(lambda: (h * y * y).sum() / 2)
        return row["lambda_max_fo"]

    assert all(found(seed, 1) < 2.9 for seed in range(6))  # the seeds of the six measurements
    assert found(0, 6) == pytest.approx(3.0, rel=1e-3)


def test_gaussian_directions_without_gradients():
    """Frobenius norm, trace and gradient's norm by losses alone, within 4 standard errors."""
    toy = Quadratic()
    optimizer = HybridZOFO([toy.x], lr=1e-3, mode="zo")
    recorder = SmoothnessRecorder(optimizer, directions=200, method="forward")
    row = recorder.measure(toy)
    assert row["gradients"] == 0
    assert abs(row["trace_zo"] - 12.0) < 4 * row["trace_error_zo"]
    assert row["trace_error_zo"] == pytest.approx(math.sqrt(2 / 200) * 0.5 * 24**0.5, rel=0.2)
    assert abs(row["frobenius_zo"] - toy.A.norm().item()) < 4 * row["frobenius_error_zo"]
    assert row["smoothness_zo"] == row["frobenius_zo"]
    assert row["largest_zo"] is None
    assert row["stable_lr_zo"] == pytest.approx(2 / (0.5 * 26), rel=0.1)


# ---- a run is not changed ----------------------------------------------------------------------


class Model(nn.Module):
    """A frozen base with batch norm and dropout, a head that trains; draws of every generator."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh())
        self.base.requires_grad_(False)
        self.head = nn.Linear(8, 3)

    def forward(self, x, target):
        x = x + 0.01 * random.random() + 0.01 * float(np.random.rand())  # noqa: NPY002
        return nn.functional.cross_entropy(self.head(self.base(x)), target)


def batches(count):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        x = torch.randn(6, 4, generator=generator)
        yield x, torch.randint(3, (6,), generator=generator)


def trained(recording, perturbation="in_place", own_backward=False, accumulate=1, **options):
    """Everything that a run leaves: weights, buffers, gradients, state, draws; and its rows."""
    model = Model()
    optimizer = HybridZOFO(
        hybrid_param_groups(model, zo=dict(lr=1e-3), fo=dict(lr=0.1, momentum=0.9), verbose=False),
        perturbation=perturbation,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    recorder = SmoothnessRecorder(optimizer, every=2, directions=3, products=3, **options)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002

    def closure_of(x, target):
        def closure():
            if not own_backward:
                return model(x, target) / accumulate
            optimizer.zero_grad()
            loss = model(x, target)
            loss.backward()
            return loss

        return closure

    closures = [closure_of(*batch) for batch in batches(4 * accumulate)]
    for step in range(4):
        optimizer.zero_grad()
        ours = closures[step * accumulate : (step + 1) * accumulate]
        for place, closure in enumerate(ours):
            if recording and place == len(ours) - 1:  # while gradients are there
                recorder.step(ours)
            optimizer.backward(closure)
        optimizer.step()
        scheduler.step()
    left = [*model.state_dict().values(), *(p.grad for p in model.head.parameters())]
    left += [p.grad for p in model.base.parameters()]
    left += [s["momentum_buffer"] for s in optimizer.state.values()]
    draws = torch.rand(4), random.random(), float(np.random.rand())  # noqa: NPY002
    required = [p.requires_grad for p in model.parameters()]
    return left, draws, required, recorder.rows


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "how", [{}, dict(perturbation="streamed", own_backward=True), dict(accumulate=2)]
)
def test_a_run_is_the_same_bits(method, how):
    with_it, draws, required, rows = trained(True, method=method, **how)
    without, draws_without, required_without, none = trained(False, method=method, **how)
    assert len(rows) == 2
    assert none == []
    assert len(with_it) == len(without)
    for a, b in zip(with_it, without, strict=True):
        assert a is b is None or same_bits(a.double(), b.double())
    assert torch.equal(draws[0], draws_without[0])
    assert draws[1:] == draws_without[1:]
    assert required == required_without
    assert [(row["step"], row["lr_zo"]) for row in rows] == [(0, 1e-3), (2, 5e-4)]
    assert all(row["smoothness_fo"] > 0 for row in rows)


@pytest.mark.parametrize("backward", [False, True])
def test_micro_batches_are_one_batch(backward):
    """Their closures in a list: all that is measured is that of the sum of the losses."""
    toy = Quadratic()

    def part(factor):
        def closure():
            loss = factor * toy()
            if backward and torch.is_grad_enabled():
                loss.backward()
            return loss

        return closure

    rows = [
        SmoothnessRecorder(toy.optimizer()).measure(closures)
        for closures in ([part(0.75), part(0.25)], toy)
    ]
    for row in rows:
        row.pop("evaluations"), row.pop("gradients")
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)


def test_unequal_micro_batches_of_examples():
    """What the optimizer adds up are means; here of 4 and of 2 examples."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6, 5, dtype=torch.float64), requires_grad=False)
    batches = [torch.randn(count, 6, dtype=torch.float64) for count in (4, 2)]
    options = dict(structure="low_rank", perturbation="streamed", directions="per_example")
    optimizer = HybridZOFO([("w", w)], lr=1e-3, mode="zo", **options)
    closures = [lambda x=x: (x @ w).square().sum(1) for x in batches]
    row = SmoothnessRecorder(optimizer, directions=100, method="forward").measure(closures)
    assert row["loss"] == pytest.approx(sum(f().mean().item() for f in closures))
    trace = 2 * 5 * sum(x.square().sum().item() / len(x) for x in batches)
    assert abs(row["trace_zo"] - trace) < 4 * row["trace_error_zo"]
    assert row["trace_error_zo"] < 0.1 * trace


def test_an_adapter_of_16_bits():
    """With ``method="forward"`` its products come from double backward: it has no differences."""
    toy = Quadratic()
    toy.y = nn.Parameter(toy.y.detach().bfloat16())

    def closure():
        y = toy.y.double()
        return (toy.x @ toy.A @ toy.x + y @ toy.B @ y) / 2

    row = SmoothnessRecorder(toy.optimizer(), method="forward").measure(closure)
    assert row["largest_fo"] == pytest.approx(4.0, rel=0.02)
    with pytest.raises(TypeError, match="take method='exact'"):
        SmoothnessRecorder(toy.optimizer()).measure(closure)


@pytest.mark.parametrize("modes", [("zo", "fo"), ("fo",)])
def test_a_base_of_16_bits(modes):
    """Through it an adapter of 32 bits has no differences either, known to the optimizer or not."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)).requires_grad_(False)
    head, x, rows = nn.Linear(8, 1), torch.randn(16, 6), []
    groups = [dict(params=list(base.parameters()), lr=1e-3, mode="zo")] * ("zo" in modes)
    groups.append(dict(params=list(head.parameters()), lr=1e-2, mode="fo"))

    def closure():
        return head(base(x.to(base[0].weight.dtype)).float()).square().mean()

    for dtype, method in ((torch.float32, "exact"), (torch.bfloat16, "exact")):
        base.to(dtype)
        rows.append(SmoothnessRecorder(HybridZOFO(groups), method=method).measure(closure))
    if "zo" in modes:
        rows.append(SmoothnessRecorder(HybridZOFO(groups), method="forward").measure(closure))
        assert rows[0]["stable_lr_zo"] is not None
        for name in ("trace_zo", "trace_error_zo", "frobenius_zo", "stable_lr_zo"):
            assert rows[2][name] is None, name
        assert rows[1]["stable_lr_zo"] is None
        assert rows[1]["trace_zo"] == pytest.approx(rows[0]["trace_zo"], rel=0.1)
    for name in ("frobenius_fo", "largest_fo", "stable_lr_fo"):
        for row in rows[1:]:
            assert row[name] == pytest.approx(rows[0][name], rel=0.05), name
    with pytest.raises(TypeError, match="take method='exact'"):
        SmoothnessRecorder(HybridZOFO(groups)).measure(closure)


def test_autocast_has_no_differences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    model[0].requires_grad_(False)
    x = torch.randn(16, 6)

    def closure(enabled=True):
        with torch.autocast("cpu", enabled=enabled):
            return model(x).float().square().mean()

    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False)
    with pytest.raises(TypeError, match="must not compute in 16 bits"):
        SmoothnessRecorder(HybridZOFO(groups)).measure(closure)
    expected = SmoothnessRecorder(HybridZOFO(groups), products=20).measure(lambda: closure(False))
    for method in ("exact", "forward"):
        recorder = SmoothnessRecorder(HybridZOFO(groups), products=20, method=method)
        row = recorder.measure(closure)
        assert row["largest_fo"] == pytest.approx(expected["largest_fo"], rel=0.05)
        assert row["stable_lr_zo"] is None


@pytest.mark.parametrize("modes", [("zo",), ("fo",)])
def test_one_mode_alone(modes):
    toy = Quadratic()
    recorder = SmoothnessRecorder(toy.optimizer(modes=modes))
    row = recorder.measure(toy)
    assert {name[-3:] for name in row if name[-3:] in ("_zo", "_fo")} == {f"_{modes[0]}"}
    assert row["loss"] == pytest.approx(toy().item())


@pytest.mark.parametrize("method", METHODS)
def test_cost_is_counted(method, monkeypatch):
    """Of double backward each pass counts, the first of which is that of the closure's run."""
    toy, calls, passes = Quadratic(), [], []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(0) or grad(*a, **k))

    def closure():
        calls.append(torch.is_grad_enabled())
        return toy()

    recorder = SmoothnessRecorder(toy.optimizer(), directions=4, products=3, method=method)
    row = recorder.measure(closure)
    assert row["gradients"] == (len(passes) if method == "exact" else sum(calls))
    assert (len(passes) > 2 * (4 + 3)) == (method == "exact")
    assert row["evaluations"] == len(calls) - sum(calls)


def test_a_run_that_has_diverged_is_recorded():
    toy = Quadratic()
    for method in METHODS:
        recorder = SmoothnessRecorder(toy.optimizer(), method=method)
        with pytest.warns(UserWarning, match="loss at step 0 is not finite: the run diverges"):
            row = recorder.measure(lambda: toy() * math.inf)
        assert row["loss"] is None
        assert row["stable_lr_fo"] is None
        assert row["stable_lr_zo"] is None
        assert row["lr_fo"] == 1e-2
        json.dumps(row, allow_nan=False)


# ---- files --------------------------------------------------------------------------------------


def recorded(steps=5):
    toy = Quadratic()
    recorder = SmoothnessRecorder(toy.optimizer(), every=2)
    found = [recorder.step(toy) for _ in range(steps)]
    assert [row is not None for row in found] == [step % 2 == 0 for step in range(steps)]
    return toy, recorder


def test_json_goes_on(tmp_path):
    toy, recorder = recorded()
    recorder.save(tmp_path / "deep" / "rows.json")
    other = SmoothnessRecorder(toy.optimizer(), every=2)
    other.load(tmp_path / "deep" / "rows.json")
    assert other.rows == recorder.rows
    assert other.steps == 5
    assert other.step(toy) is None
    assert other.step(toy)["step"] == 6
    assert [row["step"] for row in other.rows] == [0, 2, 4, 6]


def test_csv_has_all_columns(tmp_path):
    _, recorder = recorded()
    recorder.save(tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    for read, row in zip(rows, recorder.rows, strict=True):
        assert list(read) == list(row)
        assert {k: float(v) for k, v in read.items()} == pytest.approx(row)
    with pytest.raises(ValueError, match=r"path must be a JSON file .*rows\.csv"):
        recorder.load(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"format": "zofo-optim smoothness rows"}', "\xff"]
)
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "rows.json").write_text(content, encoding="latin-1")
    _, recorder = recorded()
    before = list(recorder.rows)
    with pytest.raises(ValueError, match=r"path must be a JSON file of SmoothnessRecorder\.save"):
        recorder.load(tmp_path / "rows.json")
    assert recorder.rows == before


def test_scatter_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    _, recorder = recorded()
    points = recorder.scatter()
    assert list(points) == ["zo", "fo"]
    for mode, (norms, curvatures) in points.items():
        assert curvatures == [row[f"smoothness_{mode}"] for row in recorder.rows]
        assert norms == [
            math.hypot(row["gradient_norm_zo"], row["gradient_norm_fo"]) for row in recorder.rows
        ]
    recorder.plot(tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_known_is_not_drawn(tmp_path, monkeypatch):
    """Lines break there, and legends are above the axes."""
    pytest.importorskip("matplotlib")
    from zofo_optim.smoothness import plots

    made = []
    figure = plots.figure
    monkeypatch.setattr(plots, "figure", lambda *a: made.append(figure(*a)) or made[-1])
    rows = [{"step": s, "lr_zo": 1.0, "stable_lr_zo": v} for s, v in enumerate([2.0, None, 3.0])]
    plots.draw_rows(rows, tmp_path / "rows.png")
    axes = made[0].axes[2]
    _, stable = axes.lines
    np.testing.assert_array_equal(stable.get_ydata(), [2.0, math.nan, 3.0])
    assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1 - 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(every=0), "every must be an int >= 1, got 0"),
        (dict(directions=1), "directions must be an int >= 2, got 1"),
        (dict(products=True), "products must be an int >= 1, got True"),
        (dict(patience=0.5), "patience must be an int >= 1, got 0.5"),
        (dict(seed=-1), "seed must be an int >= 0, got -1"),
        (dict(method="backward"), "method must be one of .*got 'backward'"),
        (dict(margin=-0.1), "margin must be a number >= 0, got -0.1"),
        (dict(margin=math.nan), "margin must be a number >= 0, got nan"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(ValueError, match=said):
        SmoothnessRecorder(Quadratic().optimizer(), **options)


def test_what_is_refused():
    toy = Quadratic()
    with pytest.raises(TypeError, match="optimizer must be a HybridZOFO, got SGD"):
        SmoothnessRecorder(torch.optim.SGD([toy.y], lr=0.1))
    optimizer = toy.optimizer()
    recorder = SmoothnessRecorder(optimizer)
    for closure in (None, [], [toy, 3]):
        with pytest.raises(TypeError, match="closure must be"):
            recorder.step(closure)

    def closure():
        recorder.measure(toy)
        return toy()

    with pytest.raises(RuntimeError, match="inside a closure"):
        optimizer.step(closure)
    assert recorder.rows == []
    assert recorder.steps == 0
