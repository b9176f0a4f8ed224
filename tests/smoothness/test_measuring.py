"""Smoothness against Hessians in closed form: quadratics and logistic regression."""

import math

import pytest
import torch
from hessians import Counted, hessian_of, logistic, quadratic
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import Parameter

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.smoothness import (
    BlockSmoothness,
    HessianProducts,
    Smoothness,
    largest_eigenvalue,
    measure_smoothness,
)

METHODS = ("finite_difference", "exact")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [quadratic, logistic])
def test_each_block_is_that_of_the_diagonal(make, method):
    """Norm and trace within 4 standard errors, gradient and eigenvalue nearly exactly."""
    blocks, closure = make()
    found = measure_smoothness(blocks, closure, directions=400, method=method)
    assert set(found) == {"x", "y"}
    assert found.loss == pytest.approx(closure().item(), rel=1e-12)
    for name, p in blocks.items():
        hessian, gradient = hessian_of(closure, p)
        block = found[name]
        assert block.parameters == p.numel()
        assert block.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-9)
        assert abs(block.frobenius - hessian.norm()) < 4 * block.frobenius_error
        assert block.frobenius_error < 0.1 * block.frobenius
        assert abs(block.trace - hessian.trace()) < 4 * block.trace_error
        values = torch.linalg.eigvalsh(hessian)
        assert block.largest == pytest.approx(values[values.abs().argmax()].item(), rel=1e-2)
        assert block.smoothness == abs(block.largest)
        assert block.effective_dimension == block.trace / abs(block.largest)
        assert block.participation_ratio == block.trace**2 / block.frobenius**2


def test_without_a_backward():
    """Both within 4 standard errors, from losses; there is no eigenvalue, but its bound."""
    blocks, closure = quadratic()
    counted = Counted(closure)
    with torch.no_grad():  # nothing takes a gradient
        found = measure_smoothness(blocks, counted, directions=1000, method="forward")
    assert found.evaluations == 2 * 2001
    assert counted.calls <= found.evaluations + 2 * 40  # that verify
    for name, p in blocks.items():
        hessian, gradient = hessian_of(closure, p)
        block = found[name]
        assert abs(block.frobenius - hessian.norm()) < 4 * block.frobenius_error
        assert abs(block.trace - hessian.trace()) < 4 * block.trace_error
        assert block.gradient_norm == pytest.approx(gradient.norm().item(), rel=0.1)
        assert block.largest is None
        assert block.effective_dimension is None
        assert block.smoothness == block.frobenius


def test_the_norm_is_unbiased_and_its_error_is_its_spread():
    """Over 200 seeds of two directions each: the mean square is ||H||_F^2 within 4 errors."""
    blocks, closure = quadratic()
    hessian, _ = hessian_of(closure, blocks["x"])
    options = dict(directions=2, method="exact", largest=False)
    found = [
        measure_smoothness({"x": blocks["x"]}, closure, seed=seed, **options)["x"].frobenius ** 2
        for seed in range(200)
    ]
    values = torch.tensor(found, dtype=torch.float64)
    assert abs(values.mean() - hessian.square().sum()) < 4 * values.std() / 200**0.5


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_products_are_those_of_autograd(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    w, b, x, v, u = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, columns), (rows,), (columns,), (rows, columns), (rows,))
    )
    p, q = Parameter(w), Parameter(b)

    def loss(w, b):
        return torch.tanh(w @ x + b).square().sum() + (w.sin() * b[:, None]).sum()

    _, right = torch.autograd.functional.hvp(loss, (w, b), (v, u))
    for method, tolerance in (("exact", 1e-10), ("finite_difference", 1e-2)):
        with HessianProducts({"w": p, "b": q}, [lambda: loss(p, q)], method=method) as products:
            found = products([v, u])
            scale = 1e-9 + sum(r.abs().max() for r in right)
            for f, r in zip(found, right, strict=True):
                assert (f - r).abs().max() <= tolerance * scale
            assert all(not h.any() for h in products([torch.zeros_like(v), torch.zeros_like(u)]))


def test_several_closures_are_their_mean():
    blocks, closure = quadratic()
    both = [lambda: 3 * closure(), lambda: -closure()]
    for method in (*METHODS, "forward"):
        options = dict(directions=5, method=method, largest=method != "forward")
        one = measure_smoothness(blocks, closure, **options)
        two = measure_smoothness(blocks, both, **options)
        assert two.loss == pytest.approx(one.loss)
        for name in blocks:
            assert two[name].frobenius == pytest.approx(one[name].frobenius, rel=1e-6)
            assert two[name].trace == pytest.approx(one[name].trace, rel=1e-6)


def test_negative_eigenvalues_and_a_warm_start():
    diagonal = torch.linspace(-9, 5, 40, dtype=torch.float64)
    x = Parameter(torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    def loss():
        return (diagonal * x.square()).sum() / 2

    with HessianProducts({"x": x}, [loss], method="exact") as products:
        found = largest_eigenvalue(products)
    assert found.value == pytest.approx(-9, rel=1e-2)
    assert abs(found.vector[0]) > 0.9
    counts = []
    for start in (None, found.vector):
        counted = Counted(loss)
        with HessianProducts({"x": x}, [counted]) as products:
            assert largest_eigenvalue(products, start=start).value == pytest.approx(-9, rel=1e-2)
        counts.append(counted.calls)
    assert counts[1] < counts[0]


class TestBlocks:
    def model(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        model[0].requires_grad_(False)
        x = torch.randn(5, 3)
        return model, lambda: model(x).square().mean()

    def names(self, target, closure, by):
        found = measure_smoothness(target, closure, by=by, directions=2, largest=False)
        return {name: block.parameters for name, block in found.items()}

    def test_of_a_module(self):
        model, closure = self.model()
        assert self.names(model, closure, "mode") == {"zo": 16, "fo": 10}
        assert self.names(model, closure, "layer") == {"zo, 0": 16, "fo, 2": 10}
        by_tensor = {name: p.numel() for name, p in model.named_parameters()}
        assert self.names(model, closure, "tensor") == by_tensor

    def test_of_an_optimizer_and_its_groups(self):
        model, closure = self.model()
        groups = hybrid_param_groups(model, zo=dict(lr=1e-3), fo=dict(lr=0.1), verbose=False)
        for target in (groups, HybridZOFO(groups)):
            assert self.names(target, closure, "mode") == {"zo": 16, "fo": 10}
            assert (
                self.names(target, closure, "tensor").keys()
                == dict(model.named_parameters()).keys()
            )
            grouped = self.names(target, closure, "group")
            assert sorted(grouped.values()) == [10, 16]
            assert {name[-4:] for name in grouped} == {"(zo)", "(fo)"}
        assert self.names(torch.optim.Adam(model[2].parameters()), closure, "mode") == {"fo": 10}
        bare = [dict(params=[("w", model[2].weight)]), dict(params=model[2].bias)]
        assert self.names(bare, closure, "tensor") == {"w": 8, "group 1, parameter 0": 2}

    def test_named_by_the_user(self):
        model, closure = self.model()
        target = {"head": dict(model[2].named_parameters()), "first": [model[0].weight]}
        assert self.names(target, closure, "mode") == {"head": 10, "first": 12}
        with pytest.raises(ValueError, match="by must be left out where target names its own"):
            self.names(target, closure, "layer")


def test_it_is_printed_saved_and_loaded(tmp_path):
    blocks, closure = quadratic()
    found = measure_smoothness(blocks, closure, directions=3)
    found.save(tmp_path / "deep" / "found.json")
    assert Smoothness.load(tmp_path / "deep" / "found.json") == found
    lines = str(found).splitlines()
    assert lines[0].split()[0] == "block"
    assert [line.split()[0] for line in lines[2:4]] == ["x", "y"]
    assert f"{found.evaluations} evaluations" in lines[-1]
    (tmp_path / "other.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="path must be of a saved Smoothness"):
        Smoothness.load(tmp_path / "other.json")
    with pytest.raises(OSError, match="nowhere"):
        Smoothness.load(tmp_path / "nowhere")


def test_flat_losses_have_no_dimension():
    flat = BlockSmoothness(3, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert flat.effective_dimension is None
    assert flat.participation_ratio is None
    for method in METHODS:
        for size in (3, 30):
            x = Parameter(torch.ones(size, dtype=torch.float64))
            found = measure_smoothness({"x": x}, x.sum, directions=2, method=method)["x"]
            assert found.gradient_norm == pytest.approx(math.sqrt(size))
            assert found.frobenius == found.largest == pytest.approx(0, abs=1e-9)
