"""What torch tests of calls, in every mode: closures, gradient modes, returned losses."""

import gc
import weakref

import pytest
import torch
from conftest import each_of
from least_squares import MODES, Problem, equal, make
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedules

pytestmark = pytest.mark.usefixtures("seeded")
mode = each_of(MODES)


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_grad_mode_is_restored(mode, outside):
    problem, seen = Problem(), []
    optimizer = make(problem.params, mode)

    def closure():
        seen.append(torch.is_grad_enabled())
        return problem.loss()

    def fail():
        raise KeyError

    with outside():
        enabled = torch.is_grad_enabled()
        optimizer.step(closure)
        assert torch.is_grad_enabled() == enabled
        optimizer.zero_grad()
        optimizer.backward(closure)
        assert torch.is_grad_enabled() == enabled
        optimizer.step()
        assert torch.is_grad_enabled() == enabled
        with pytest.raises(KeyError):
            optimizer.step(fail)
        assert torch.is_grad_enabled() == enabled
    assert torch.is_grad_enabled()
    once = {"fo": [True], "zo": [False, False], "hybrid": [True, False, False]}[mode]
    first = once + [False] * (mode != "fo")  # one evaluation more, to compare
    assert seen == first + once


def test_step_returns_what_the_closure_returned(mode):
    problem = Problem()
    optimizer = make(problem.params, mode, lr=0.0, mu=1e-4)
    clean = problem.loss().item()
    loss = optimizer.step(problem.closure(optimizer))
    assert isinstance(loss, torch.Tensor)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(clean, rel=1e-3)
    assert optimizer.last_loss.item() == pytest.approx(clean, rel=1e-3)
    assert not optimizer.last_loss.requires_grad

    def number():
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss.item()

    returned = optimizer.step(number)
    assert type(returned) is float
    assert returned == pytest.approx(clean, rel=1e-3)
    optimizer.zero_grad()
    optimizer.backward(problem.loss)
    assert optimizer.step() is None


@pytest.mark.parametrize("style", ["loss only", "documented", "number", "one element"])
def test_closure_styles_are_the_same(mode, style):
    reference, problem = Problem(torch.float64), Problem(torch.float64)
    expected, optimizer = (make(p.params, mode, momentum=0.5) for p in (reference, problem))

    def closure():
        if style == "documented":
            return problem.closure(optimizer)()
        if style == "number":
            return problem.closure(optimizer)().item()
        return problem.loss().reshape(1, 1) if style == "one element" else problem.loss()

    for _ in range(4):
        expected.zero_grad()
        expected.step(reference.loss)
        optimizer.zero_grad()
        optimizer.step(closure)
    assert equal(problem.values(), reference.values())
    assert not equal(problem.values(), Problem(torch.float64).values())


BAD_RESULTS = {
    "None": (lambda p: None, TypeError, "does it end in 'return loss'"),
    "tuple": (lambda p: (p.sum(), 1), TypeError, "got tuple"),
    "vector": (lambda p: p * 1, ValueError, r"scalar loss \(one element\), got shape"),
    "empty": (lambda p: p[:0], ValueError, "scalar loss"),
    "complex": (lambda p: p.sum() * 1j, TypeError, "real loss, got dtype torch.complex"),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_a_closure_must_return_a_real_scalar(mode, case):
    bad, error, message = BAD_RESULTS[case]
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = make([p, q], mode)
    with pytest.raises(error, match=message):
        optimizer.step(lambda: bad(q))
    torch.testing.assert_close([p.detach(), q.detach()], [torch.ones(3)] * 2, rtol=0, atol=1e-6)


def test_step_needs_a_closure_that_can_be_called(mode):
    optimizer = make(Problem().params, mode)
    with pytest.raises(RuntimeError, match=r"step\(\) needs a closure"):
        optimizer.step()
    with pytest.raises(TypeError, match="closure must be callable, got float"):
        optimizer.step(0.5)
    with pytest.raises(TypeError, match="closure must be callable, got NoneType"):
        optimizer.backward(None)


def test_zero_grad_to_zero_or_none(mode):
    problem = Problem()
    optimizer = make(problem.params, mode)
    for p in problem.params:
        p.grad = torch.ones_like(p)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad.abs().sum() == 0 for p in problem.params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in problem.params)


def test_no_reference_cycle_keeps_an_optimizer_alive(mode):
    problem = Problem()
    optimizer = make(problem.params, mode, momentum=0.9)
    optimizer.step(problem.loss)
    schedules.StepLR(optimizer, 3)
    alive = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()
