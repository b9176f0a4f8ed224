"""perturbation="streamed": writes to weights raise, and exceptions leave weights to the bit."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from streamed_models import Around, Call, assert_same, contents, frozen, randn, tokens, trained
from torch import nn

from zofo_optim.watch import ClosureWatch


def set_data(w):
    w.data = torch.zeros(4, 4)


def set_item(w):
    w[0] = 1.0


def augmented(w):
    w[0, 1] += 1.0


def operator(w):
    w += 1.0


def module_to(w):
    holder = nn.Module()
    holder.w = w
    holder.double()


WRITES = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(4, 4)),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(1.0),
    "normal_": lambda w: nn.init.normal_(w),
    "uniform_ by keyword": lambda w: nn.init.uniform_(tensor=w),
    "xavier": lambda w: nn.init.xavier_uniform_(w),
    "w.data =": set_data,
    "w[0] =": set_item,
    "w[0] +=": augmented,
    "w +=": operator,
    "out=w": lambda w: torch.mul(torch.ones(4, 4), 2, out=w),
    "out=(w, ...)": lambda w: torch.sort(
        torch.ones(4, 4), out=(w, torch.empty(4, 4, dtype=torch.long))
    ),
    "relu(inplace=True)": lambda w: F.relu(w, inplace=True),
    "dropout(..., True)": lambda w: F.dropout(w, 0.5, True, True),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "index_put_": lambda w: w.index_put_((torch.tensor([0]),), torch.ones(4)),
    "embedding max_norm": lambda w: F.embedding(tokens(5, high=4), w, max_norm=1e-3),
    "module.to": module_to,
    "clip_grad_by_value": lambda w: w.clamp_(-1, 1),
}  # fmt: skip


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("case", WRITES)
def test_writes_in_the_closure_raise(case, inference):
    model = frozen(Call(lambda w: w, w=randn(4, 4)))
    before, where = contents(model), model.w.data_ptr()
    optimizer = trained(model)

    def closure():
        value = model()
        with torch.inference_mode(inference):
            WRITES[case](model.w)
        return value

    with pytest.raises(RuntimeError, match="must not write to the zeroth-order parameter 'w'"):
        optimizer.step(closure)
    assert_same(model, before)
    assert model.w.data_ptr() == where


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", range(1, 6))
def test_exceptions_leave_weights_to_the_bit(at, error):
    """In the clean evaluation, the first, the repeated, one with written weights, the last."""
    model = frozen(Call(lambda a, b: a * b, a=randn(3).bfloat16(), b=randn(3)))
    model.b.requires_grad_(True)
    before, calls = contents(model), []
    optimizer = trained(model)

    def closure():
        calls.append(1)
        value = model()
        if len(calls) == at:
            raise error("stop")
        return value

    with pytest.raises(error, match="stop"):
        optimizer.step(closure)
    assert_same(model, before)
    optimizer.zero_grad()
    optimizer.step(model)  # and the optimizer works on
    assert not torch.equal(model.a, before[0])


def test_ctrl_c_at_any_time_leaves_weights_to_the_bit():
    """A signal in the midst of each kind of evaluation."""
    model = frozen(Around(nn.Linear(4, 3), randn(5, 4)))
    before = contents(model)
    for at in range(1, 5):
        calls = []

        def closure(calls=calls, at=at):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return model()

        with pytest.raises(KeyboardInterrupt):
            trained(model).step(closure)
        assert_same(model, before)


def test_a_mode_that_ctrl_c_left_behind_does_nothing(monkeypatch):
    model = frozen(Call(lambda w: w, w=randn(3)))
    before, optimizer = model.w.clone(), trained(model)

    def interrupted(*error):
        raise KeyboardInterrupt

    modes = torch._C._len_torch_function_stack()
    monkeypatch.setattr(ClosureWatch, "__exit__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(model)
    try:
        assert torch._C._len_torch_function_stack() == modes + 1
        assert torch.equal(model.w * 1, before)
    finally:
        torch._C._pop_torch_function_stack()
