"""Losses and targets that would give wrong numbers: they are told, refused, or measured right."""

from contextlib import nullcontext

import pytest
import torch
from conftest import same_bits
from torch import nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from zofo_optim import HybridZOFO
from zofo_optim.smoothness import measure_smoothness


def test_kinks_are_told_where_gradients_are_differences():
    """The curvature between kinks, by double backward; differences see the kinks themselves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)).double()
    x = 1e-3 * torch.randn(64, 8, dtype=torch.float64)  # most units are near their kinks
    nn.init.normal_(model[0].bias, std=1e-4)
    options = dict(directions=3, largest=False)

    def loss():
        return model(x).square().mean()

    with pytest.warns(UserWarning, match=r"depend on their length: .* kinks \(ReLU\)"):
        measure_smoothness(model, loss, step=0.01, **options)
    measure_smoothness(model, loss, method="exact", **options)


def test_rounding_is_told_where_gradients_are_differences():
    x = Parameter(torch.linspace(1, 2, 50))
    with pytest.warns(UserWarning, match="what is measured is rounding"):
        measure_smoothness({"x": x}, lambda: x.exp().sum(), step=3e-7, directions=2, largest=False)


@pytest.fixture
def reentrant():
    """Two layers, the first of which is checkpointed; x requires a gradient, as it must there."""
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def closure(use_reentrant=True):
        hidden = checkpoint(first, x, use_reentrant=use_reentrant)
        return second(hidden.tanh()).square().mean()

    return first, second, closure


def test_reentrant_checkpointing_has_no_second_derivative(reentrant):
    first, _, closure = reentrant
    target, options = {"first": [*first.parameters()]}, dict(directions=3)
    with pytest.raises(TypeError, match="re-entrant checkpointing where method='exact'"):
        measure_smoothness(target, closure, method="exact", **options)
    found = measure_smoothness(target, closure, **options)["first"]
    right = measure_smoothness(target, lambda: closure(False), method="exact", **options)["first"]
    assert found.frobenius == pytest.approx(right.frobenius, rel=1e-2)


def test_layers_that_run_again_keep_their_gradients(reentrant):
    first, second, closure = reentrant
    gradient = first.weight.grad = torch.full((4, 3), 7.0, dtype=torch.float64)
    measure_smoothness({"second": [*second.parameters()]}, closure, directions=2)
    assert first.weight.grad is gradient
    assert same_bits(gradient, torch.full((4, 3), 7.0, dtype=torch.float64))
    assert first.bias.grad is None


def test_norms_of_sixteen_bits_neither_vanish_nor_overflow():
    for scale in (1e-4, 1e4):
        x = Parameter(torch.ones(8, dtype=torch.float16))
        found = measure_smoothness(
            {"x": x}, lambda x=x, scale=scale: scale * x.float().square().sum() / 2, method="exact"
        )["x"]
        assert found.frobenius == pytest.approx(scale * 8**0.5, rel=1e-2)
        assert found.gradient_norm == pytest.approx(scale * 8**0.5, rel=1e-2)


def test_losses_alone_need_32_bits():
    x = Parameter(torch.ones(8, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"bfloat16 in 'x', in which displacements round"):
        measure_smoothness({"x": x}, lambda: x.float().square().sum(), method="forward")
    y = Parameter(torch.ones(8, 8))

    def closure():
        with torch.autocast("cpu"):
            return (y @ y).float().square().sum()

    with pytest.raises(TypeError, match=r"must not compute in 16 bits .* where method='forward'"):
        measure_smoothness({"y": y}, closure, method="forward")


def test_names_that_come_again_hide_nothing():
    a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    groups = [dict(params=[*m.named_parameters()]) for m in (a, b)]
    x = torch.ones(1, 2)
    for by, names in (
        ("mode", {"fo"}),
        ("tensor", {"weight", "bias", "weight (2)", "bias (2)"}),
        ("layer", {"fo, weight", "fo, bias"}),
    ):
        found = measure_smoothness(
            groups, lambda: (a(x) * b(x)).sum(), by=by, directions=2, largest=False
        )
        assert set(found) == names
        assert sum(block.parameters for block in found.values()) == 6
    with pytest.raises(ValueError, match="must name its blocks differently"):
        measure_smoothness({1: [a.weight], "1": [b.weight]}, lambda: a(x).sum())


def test_a_tensor_counts_once_in_a_block():
    p = Parameter(torch.ones(4, dtype=torch.float64))
    options = dict(directions=2, method="exact")
    twice = measure_smoothness({"x": [p, p]}, lambda: p.square().sum(), **options)["x"]
    assert twice == measure_smoothness({"x": p}, lambda: p.square().sum(), **options)["x"]
    assert twice.parameters == 4


def test_errors_of_the_closure_are_the_users():
    """Also while the eigenvalue is looked for, which may itself not be found."""
    x = Parameter(torch.ones(40, dtype=torch.float64))
    calls = []

    def closure():
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError("out of memory")
        return x.square().sum()

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        measure_smoothness({"x": x}, closure, directions=3)


def test_parameters_without_dimensions():
    scale = Parameter(torch.tensor(2.0, dtype=torch.float64))
    rest = Parameter(torch.ones(20, dtype=torch.float64))
    found = measure_smoothness(
        {"x": [scale, rest]}, lambda: scale.square() * rest.square().sum(), directions=3
    )
    assert found["x"].largest > 0


def test_buffers_of_a_model_that_the_target_does_not_know():
    norm = nn.BatchNorm1d(3)
    x = torch.randn(6, 3)
    optimizer = torch.optim.SGD(norm.parameters())
    before = norm.running_mean.clone()
    options = dict(directions=2, largest=False)
    measure_smoothness(optimizer, lambda: norm(x).square().mean(), model=norm, **options)
    assert same_bits(norm.running_mean, before)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        measure_smoothness(optimizer, lambda: norm(x).square().mean(), model=3)


@pytest.mark.parametrize("method", ["finite_difference", "exact"])
def test_closures_must_not_write_parameters(method):
    x = Parameter(torch.ones(4))

    def closure():
        with torch.no_grad():
            x.mul_(0.5)
        return x.square().sum()

    with pytest.raises(RuntimeError, match="closure must not write parameters"):
        measure_smoothness({"x": x}, closure, directions=2, method=method)
    assert same_bits(x.detach(), torch.ones(4))


@pytest.mark.parametrize("method", ["finite_difference", "exact", "forward"])
def test_a_block_that_the_loss_does_not_reach_is_flat(method):
    x, unused = (Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
    options = dict(directions=3, method=method, largest=method != "forward")
    told = pytest.warns(UserWarning, match="does not reach 'unused', which counts as flat")
    with told if method != "forward" else nullcontext():
        found = measure_smoothness({"x": x, "unused": unused}, lambda: x.square().sum(), **options)
    assert found["unused"].gradient_norm == found["unused"].frobenius == 0
    assert found["x"].trace == pytest.approx(8, rel=0.5)
    if method != "forward":
        with pytest.raises(TypeError, match="graph to the parameters"):
            measure_smoothness({"unused": unused}, lambda: x.square().sum(), **options)


def test_losses_of_examples_without_a_backward():
    x = Parameter(torch.ones(4, dtype=torch.float64))
    groups = [dict(params=[x], mode="zo", lr=1.0)]
    optimizer = HybridZOFO(
        groups, directions="per_example", structure="low_rank", perturbation="streamed"
    )
    options = dict(directions=5, method="forward", largest=False)
    of_examples = measure_smoothness(optimizer, lambda: x.square(), **options)
    right = measure_smoothness(optimizer, lambda: x.square().mean(), **options)
    assert of_examples["zo"] == right["zo"]


def test_what_is_no_target_or_closure():
    x = Parameter(torch.ones(4))
    with pytest.raises(TypeError, match="must map names to tensors, got NoneType for 'x'"):
        measure_smoothness({"x": None}, x.sum)
    with pytest.raises(
        TypeError, match=r"such as lambda: model\(\*\*batch\)\.loss, or a sequence of them, got 3"
    ):
        measure_smoothness({"x": x}, 3)
    alone = measure_smoothness(dict(params=[x]), lambda: x.square().sum(), directions=2)
    assert alone["fo"].parameters == 4


@pytest.mark.parametrize("method", ["finite_difference", "forward"])
def test_an_adapter_in_a_16_bit_model_has_no_differences(method):
    """peft keeps LoRA in 32 bits there."""
    base = torch.randn(8, 8).bfloat16()
    adapter = Parameter(torch.ones(8, 8))

    def closure():
        return ((base @ base) @ adapter.bfloat16()).float().square().mean()

    with pytest.raises(TypeError, match=r"must not compute in 16 bits \(weights, or autocast\)"):
        measure_smoothness({"adapter": adapter}, closure, method=method, directions=2)
    found = measure_smoothness({"adapter": adapter}, closure, method="exact", directions=2)
    assert found["adapter"].frobenius > 0


def test_closures_that_draw_another_batch_are_refused():
    x = Parameter(torch.ones(4, dtype=torch.float64))
    batches = iter(torch.randn(1000, 4, dtype=torch.float64, generator=torch.manual_seed(0)))
    with pytest.raises(RuntimeError, match="must give the same loss at the same weights"):
        measure_smoothness({"x": x}, lambda: (x @ next(batches)).square(), directions=2)


def test_limits_of_rates():
    """f = x'Dx / 2 with D = diag(1..8): gradient descent up to 2 / 8, and no limit of -f."""
    x = Parameter(torch.ones(8, dtype=torch.float64))
    diagonal = torch.arange(1, 9, dtype=torch.float64)
    one, other = (
        measure_smoothness(
            {"x": x}, lambda side=side: side * (diagonal @ x.square()) / 2, directions=50
        )["x"]
        for side in (1, -1)
    )
    assert one.stable_lr == pytest.approx(2 / 8, rel=1e-2)
    assert one.stable_lr_zo == pytest.approx(2 / (36 + 16), rel=0.1)
    assert other.stable_lr is other.stable_lr_zo is None
