"""evaluate() and Ctrl-C at any point of it: what it sets up for the closure never outlives it."""

import inspect
import sys

import pytest
import torch
from torch import nn, overrides

from zofo_optim import evaluation
from zofo_optim.evaluation import Evaluator, evaluate

WATCHED = {inspect.getsourcefile(module) for module in (evaluation, overrides, torch.autograd)}
WATCHED.add(inspect.getsourcefile(torch.no_grad))


class CtrlC:
    """Raises KeyboardInterrupt at the n-th instruction or line in the watched files; counts."""

    def __init__(self, place):
        self.place, self.passed = place, 0

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in WATCHED:
            return None
        frame.f_trace_opcodes = True
        if event in ("line", "opcode"):
            self.passed += 1
            if self.passed == self.place:
                raise KeyboardInterrupt
        return self

    def during(self, run):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            return run()
        finally:
            sys.settrace(before)


@pytest.fixture
def clean_modes():
    """Take off what an interrupted exit has left on torch's stack of modes."""
    depth = len(overrides._get_current_function_mode_stack())

    def clean():
        left = len(overrides._get_current_function_mode_stack()) - depth
        for _ in range(left):
            overrides._pop_mode()
        return left

    yield clean
    clean()


@pytest.mark.parametrize("gradients", [False, True])
def test_ctrl_c_anywhere_leaves_backward_working(gradients, clean_modes):
    layer = nn.Linear(3, 1)

    def closure():
        loss = layer(torch.ones(2, 3)).sum()
        loss.backward()
        return loss

    def run():
        evaluate(closure, gradients=gradients)

    counter = CtrlC(0)
    counter.during(run)
    assert counter.passed > 30
    left = 0
    for place in range(1, counter.passed + 1):
        # RuntimeError: torch had taken the mode off for a call, and its exit misses it
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            CtrlC(place).during(run)
        assert torch.is_grad_enabled(), place
        layer.zero_grad()
        closure()
        assert layer.weight.grad is not None, place
        left += clean_modes()
    # the case that this is about; without gradients, Python 3.12 with torch 2.8 leaves none
    assert left > 0 or (not gradients and sys.version_info >= (3, 12))


def test_ctrl_c_loses_no_gradient_while_setting_it_aside():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    grads = [torch.full((2,), float(i)) for i in range(3)]
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad
    counter, entered = CtrlC(0), []

    def closure():
        entered.append(counter.passed)
        assert all(p.grad is None for p in parameters)
        return 0.0

    def run():
        with Evaluator().runs(closure, parameters, None) as evaluate:
            evaluate(False)

    counter.during(run)
    assert entered[0] > 20
    for place in range(1, entered[0] + 1):
        with pytest.raises(KeyboardInterrupt):
            CtrlC(place).during(run)
        assert all(p.grad is grad for p, grad in zip(parameters, grads, strict=True)), place
    while torch._C._len_torch_function_stack():  # a step of the optimizer holds signals back
        torch._C._pop_torch_function_stack()


@pytest.mark.parametrize("gradients", [True, False])
def test_closures_that_turn_gradients_on(gradients):
    """As Lightning's do: without gradients, no graph is kept."""
    w = torch.ones(3, requires_grad=True)
    seen = []

    @torch.enable_grad()
    def closure():
        seen.append((torch.is_grad_enabled(), (w * 2).requires_grad))
        with torch.no_grad():
            seen.append((torch.is_grad_enabled(), (w * 2).requires_grad))
        return (w * 2).sum()

    for outside in (True, False):
        with torch.set_grad_enabled(outside):
            evaluate(closure, gradients=gradients)
            assert torch.is_grad_enabled() == outside
    assert seen == [(gradients, gradients), (False, False)] * 2
    assert (w.grad is not None) == gradients
