"""perturbation="streamed": uses of weights that torch functions do not see are named."""

import copy
import threading
import warnings

import pytest
import torch
from conftest import needs_compiler
from streamed_models import Around, Call, assert_same, contents, frozen, randn, trained
from torch import nn
from torch.nn import Parameter


@needs_compiler
def test_compiled_models_run_uncompiled():
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    plain = frozen(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)))
    model = copy.deepcopy(plain)
    counter = testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    try:
        compiled(randn(5, 4))
        assert counter.frame_count == 1
        optimizer, expected = trained(model), trained(plain)
        for _ in range(2):
            optimizer.step(lambda: compiled(randn(5, 4)).sum())
            expected.step(lambda: plain(randn(5, 4)).sum())
        assert_same(model, contents(plain))
        assert counter.frame_count == 1
        compiled(randn(6, 4))  # compiles again, for another shape
        assert counter.frame_count == 2
    finally:
        torch._dynamo.reset()


@needs_compiler
def test_threads_that_step_at_once_leave_compiling_on():
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    counter, inside, left = testing.CompileCounter(), threading.Event(), threading.Event()
    compiled = torch.compile(frozen(nn.Linear(4, 1)), backend=counter)
    model = frozen(nn.Linear(4, 1))

    def loss():  # begins before the other's step ends, and ends after it
        inside.set()
        assert left.wait(60)
        return model(randn(5, 4)).sum()

    thread = threading.Thread(target=trained(model).step, args=(loss,))

    def first():
        if not thread.is_alive():
            thread.start()
        assert inside.wait(60)
        return compiled(randn(5, 4)).sum()

    try:
        trained(compiled).step(first)
        left.set()
        thread.join()
        assert counter.frame_count == 0
        compiled(randn(5, 4))
        assert counter.frame_count == 1
    finally:
        left.set()
        torch._dynamo.reset()


class Hidden(nn.Module):
    """Uses ``seen`` by torch functions, ``hidden`` in a way of its own."""

    def __init__(self, prepare):
        super().__init__()
        self.seen, self.hidden = Parameter(torch.ones(6)), Parameter(torch.ones(6))
        self.more = nn.ParameterList([torch.ones(2) for _ in range(5)])
        self.requires_grad_(False)
        self.read = prepare(self.hidden)

    def forward(self):
        return self.seen.sum() + self.read() * 3 + sum(p.sum() for p in self.more)


def earlier_view(w):
    view = w.view(2, 3)
    return lambda: view.square().sum()


def earlier_data(w):
    data = w.data
    return lambda: data.square().sum()


def earlier_numpy(w):
    array = w.numpy()
    return lambda: float((array**2).sum())


def raw_pointer(w):
    import ctypes

    def read():
        memory = (ctypes.c_float * w.numel()).from_address(w.data_ptr())
        return sum(float(v) ** 2 for v in memory)

    return read


def raw_storage(w):
    return lambda: torch.tensor(w.untyped_storage().tolist()).float().square().sum()


def without_modes(w):
    def read():
        with torch._C.DisableTorchFunction():
            return w.square().sum()

    return read


def vmapped(w):
    return lambda: torch.vmap(lambda e: e * 2)(w).square().sum()


def subclassed(w):
    return lambda: Parameter(w, requires_grad=False).square().sum()


def in_a_thread(w):

    def read():
        found = []
        thread = threading.Thread(target=lambda: found.append(w.square().sum()))
        thread.start()
        thread.join()
        return found[0]

    return read


HIDDEN = [earlier_view, earlier_data, earlier_numpy, raw_pointer, raw_storage, without_modes,
          vmapped, subclassed, in_a_thread]  # fmt: skip


@pytest.mark.parametrize("prepare", HIDDEN, ids=lambda f: f.__name__)
def test_what_torch_functions_do_not_see_is_named(prepare):
    model = Hidden(prepare)
    before = contents(model)
    optimizer = trained(model)
    with pytest.raises(RuntimeError, match=r"another way .*: hidden; use perturbation='in_place'"):
        optimizer.step(model)
    assert_same(model, before)


def test_a_weight_that_is_seen_only_in_part_is_named():
    model = Hidden(earlier_view)
    with pytest.raises(RuntimeError, match=": hidden; use"):
        trained(model).step(lambda: model() + model.hidden.sum())


def test_several_hidden_weights_are_all_named():
    model = Hidden(earlier_view)
    views = [p.view(-1) for p in model.more[1:4]]
    with pytest.raises(RuntimeError, match=r": hidden, more\.1, more\.2, more\.3; use"):
        trained(model).step(lambda: model() + sum(v.exp().sum() for v in views))


def test_script_modules_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 3))
    model = nn.Sequential(nn.Linear(4, 4), scripted).requires_grad_(False)
    before = contents(model)
    with pytest.raises(RuntimeError, match=r": 1\.weight, 1\.bias; use"):
        trained(model).step(lambda: model(randn(5, 4)).sum())
    assert_same(model, before)


def test_verification_happens_once_for_a_set_of_parameters():
    model, counts = frozen(Call(lambda a, b: a * b, a=randn(3), b=randn(3))), []
    optimizer = trained(model)
    for _ in range(3):
        calls = []
        optimizer.step(lambda calls=calls: calls.append(1) or model())
        counts.append(len(calls))
    assert counts == [2 + 1 + 2, 2, 2]  # repeated once, then in two parts
    late = Parameter(torch.ones(3), requires_grad=False)
    optimizer.add_param_group({"params": [("late", late)], "mode": "zo", "lr": 1e-3})
    view = late.view(-1)
    with pytest.raises(RuntimeError, match=": late; use"):
        optimizer.step(lambda: model() + view.sum())


def test_a_loss_that_is_not_finite_verifies_nothing():
    model = Hidden(earlier_view)
    optimizer = trained(model)
    optimizer.step(lambda: model() * float("nan"))
    with pytest.raises(RuntimeError, match=": hidden; use"):
        optimizer.step(model)


def test_a_loss_that_does_not_repeat_warns_once():
    model = frozen(Around(nn.Linear(4, 3), randn(5, 4)))
    optimizer = trained(model)
    generator = torch.Generator().manual_seed(0)
    before = contents(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.backward(lambda: model() + torch.rand((), generator=generator))
            assert_same(model, before)
            optimizer.zero_grad()
        for _ in range(2):
            optimizer = copy.deepcopy(optimizer)
            optimizer.backward(lambda: model() + torch.rand((), generator=generator))
            optimizer.zero_grad()
    assert [str(w.message)[:25] for w in caught] == ["closure gave two losses a"]
