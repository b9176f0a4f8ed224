"""What is asked of torch's private API gets the same answer from every version."""

import threading

import pytest
import torch
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from zofo_kernels._torch_compat import (
    autocast_off_on_meta,
    know_saving_hooks,
    saving_hook,
    show_backward_to_modes,
)


class Calls(TorchFunctionMode):
    """Notices calls of backward, and swallows them where told."""

    def __init__(self, swallow):
        super().__init__()
        self.swallow, self.count = swallow, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.autograd.backward:
            self.count += 1
            if self.swallow:
                return None
        return func(*args, **(kwargs or {}))


def losses():
    p = Parameter(torch.tensor([1.0, 2.0]))
    return p, (p * p).sum(), (3 * p).sum()


def test_modes_see_the_function_backward():
    show_backward_to_modes()
    function = torch.autograd.backward
    show_backward_to_modes()
    assert torch.autograd.backward is function
    for swallow in (True, False):
        p, first, second = losses()
        with Calls(swallow) as calls:
            torch.autograd.backward(first, retain_graph=True)
            torch.autograd.backward([first, second], [torch.tensor(2.0), None])
        assert calls.count == 2
        assert p.grad is None if swallow else p.grad.tolist() == [9.0, 15.0]
    p, first, _ = losses()
    with Calls(swallow=False):
        first.backward()  # which calls the function in turn
    assert p.grad.tolist() == [2.0, 4.0]


def test_other_threads_and_callers_without_modes():
    show_backward_to_modes()
    p, first, second = losses()
    with Calls(swallow=True) as calls:
        thread = threading.Thread(target=torch.autograd.backward, args=(first,))
        thread.start()
        thread.join()
    assert calls.count == 0
    assert p.grad.tolist() == [2.0, 4.0]
    torch.autograd.backward((second,), inputs=[p])
    assert p.grad.tolist() == [5.0, 7.0]


def test_the_innermost_hook_that_saves_is_known():
    know_saving_hooks()
    push = torch._C._autograd._push_saved_tensors_default_hooks
    know_saving_hooks()
    assert torch._C._autograd._push_saved_tensors_default_hooks is push
    packs = [lambda tensor: tensor, lambda tensor: tensor]
    hooks = [torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept) for pack in packs]
    assert saving_hook() is None
    with hooks[0]:
        assert saving_hook() is packs[0]
        with hooks[1]:
            assert saving_hook() is packs[1]
        assert saving_hook() is packs[0]
    assert saving_hook() is None


def test_autocast_is_off_on_meta_in_the_block_alone():
    original = torch.autocast
    with autocast_off_on_meta(), autocast_off_on_meta():
        with torch.autocast("meta", enabled=False):
            pass
        with pytest.raises(RuntimeError), torch.autocast("meta", enabled=True):
            pass
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    assert torch.autocast is original
