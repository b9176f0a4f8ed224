"""What is asked of torch's private API gets the same answer from every version."""

import threading

import torch
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from zofo_kernels._torch_compat import show_backward_to_modes


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
