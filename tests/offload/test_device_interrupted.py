"""Passes with visiting weights that are interrupted."""

import random
import signal
import time
from contextlib import suppress

import pytest
import torch
from conftest import same_bits
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from offloaded import ON_LINUX, any_folder, assert_same, closure_of, trained
from tiny_llama import base_model, lora
from visited import home, pretended, visiting

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.offload.in_turn import is_offloaded

pytestmark = ON_LINUX
__all__ = ["any_folder", "pretended"]  # fixtures


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("call", range(1, 8))
def test_a_layer_that_raises(error, call):
    """Within an evaluation: all weights are home, and as before."""
    model = visiting(base_model().requires_grad_(False))
    optimizer, calls = trained(model, steps=0), iter(range(1, 100))

    def hook(module, args):
        if next(calls) == call:
            raise error

    handle = model.model.layers[1].mlp.act_fn.register_forward_pre_hook(hook)
    with pytest.raises(error):
        optimizer.step(closure_of(model))
    assert home(model)
    assert_same(model, base_model())
    handle.remove()
    expected = base_model().requires_grad_(False)
    trained(expected, steps=1)
    optimizer.step(closure_of(model))
    assert home(model)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a destructor
def test_signals_at_any_time():
    """Of a timer: weights are home, whole steps are made or none, and torch is in no mode."""

    class Alarm(Exception):
        pass

    def ring(number, frame):
        nonlocal rung
        rung += 1
        raise Alarm

    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(3)]
    model = visiting(nn.Sequential(*layers).requires_grad_(False))
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False)
    optimizer = HybridZOFO(groups, perturbation="streamed")
    x, rung, shortest = torch.ones(2, 4), 0, 1.0
    before = signal.signal(signal.SIGALRM, ring)
    times = random.Random(0)
    optimizer.step(lambda: model(x).square().mean())
    try:
        for _ in range(500):
            if rung == 60:
                break
            weights = [p.clone() for p in model.parameters()]
            began = time.perf_counter()
            with suppress(Alarm):
                try:
                    # Below the time of any step that ended: the slower ones of a busy machine ring.
                    signal.setitimer(signal.ITIMER_REAL, times.uniform(1e-4, shortest))
                    optimizer.step(lambda: model(x).square().mean())
                    shortest = min(shortest, time.perf_counter() - began)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            assert home(model)
            assert torch.is_grad_enabled()
            moved = [not same_bits(a, b) for a, b in zip(weights, model.parameters(), strict=True)]
            assert all(moved) or not any(moved)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung == 60


def test_a_pass_after_one_that_was_interrupted():
    """Outside of a step, where nobody knows of the interruption."""
    model = visiting(lora())
    layer = model.get_base_model().model.layers[1].mlp.act_fn

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        closure_of(model)()
    handle.remove()
    loss = closure_of(model)()
    assert home(model)
    assert same_bits(loss, closure_of(lora())())
    loss.backward()


def test_what_a_forward_writes_to_a_weight_is_kept():
    model = visiting(nn.Sequential(nn.Linear(3, 3)).requires_grad_(False))

    def write(module, args):
        module.weight.fill_(2.0)

    model[0].register_forward_pre_hook(write)
    model(torch.ones(1, 3))
    assert is_offloaded(model[0].weight)
    assert model[0].weight.eq(2).all()
