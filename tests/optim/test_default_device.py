"""Steps under another default device, and in and out of inference mode."""

import contextlib
import copy

import pytest
import torch

from zofo_kernels import Direction, Pass, Program, Shift, noise, perturb_, perturbed, replay_
from zofo_optim import HybridZOFO, Journal, load_base_weights, replay, save_base_weights

ALONG = Direction(1, 2, 0, "rademacher")


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


START = torch.linspace(-1, 1, 6).double(), torch.ones(3).double()


def weights():
    """Copies, which are where the original is whatever the default."""
    return START[0].clone(), torch.nn.Parameter(START[1].clone())


def optimizer_of(x, y, first_order, **options):
    groups = [{"params": [("x", x)], "mode": "zo", "lr": 1e-2, "weight_decay": 0.1}]
    groups += [{"params": [("y", y)], "lr": 1e-2}] * first_order
    return HybridZOFO(groups, num_samples=2, distribution="rademacher", **options)


def trained(first_order, path=None, number=False, **options):
    """Everything that a training calls, and what the weights are after it."""
    x, y = weights()
    optimizer = optimizer_of(x, y, first_order, **options)

    def closure():
        loss = (x * x).sum() + (y * y).sum()
        return loss.item() if number and not first_order else loss

    if path is not None:
        journal = Journal(path).attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(closure)
    optimizer.backward(closure)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.backward(closure)
    optimizer.step()
    assert optimizer.accumulated is None
    assert optimizer.skipped_steps == 0
    assert "loss" in optimizer.report()
    if path is not None:
        journal.close()
        start, _ = weights()
        replay({"x": start}, path)
        assert torch.equal(start, x)
    return x, y.detach()


@pytest.mark.parametrize("number", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_steps_do_not_ask_for_the_default_device(
    backend, perturbation, estimator, first_order, number
):
    options = {"backend": backend, "perturbation": perturbation, "estimator": estimator}
    expected = trained(first_order, number=number, **options)
    with default_device("meta"):
        found = trained(first_order, number=number, **options)
    assert all(map(torch.equal, found, expected))


def test_journals_do_not_ask_for_the_default_device(tmp_path):
    with default_device("meta"):
        trained(True, tmp_path / "run.zofo")


def test_kernels_do_not_ask_for_the_default_device(backend):
    w = torch.zeros(6)
    program = Program([Pass((Shift(ALONG, 1.0),), (ALONG,), (1.0,), 0.5, 0.1)])
    with default_device("meta"):
        perturb_([w], ALONG, 0.5, backend=backend)
        out = perturbed(w, ALONG, 0.5, backend=backend)
        z = noise((6,), ALONG, backend=backend)
        replay_([w.clone()], program, backend=backend)
    assert torch.equal(w, 0.5 * z)
    assert torch.equal(out, z)


@pytest.mark.parametrize("first", [True, False], ids=["first inside", "first outside"])
@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_steps_in_and_out_of_inference_mode_are_the_same(backend, perturbation, first):
    def run(inside):
        x, _ = weights()
        options = {"backend": backend, "perturbation": perturbation}
        optimizer = optimizer_of(x, None, False, **options)
        for number in range(4):
            with torch.inference_mode(inside and (number % 2 == 0) == first):
                optimizer.step(lambda: (x * x).sum())
                optimizer.backward(lambda: (x * x).sum())
            optimizer.backward(lambda: (x * x).sum())
        assert optimizer.skipped_steps == 0
        optimizer.step()
        return x

    assert torch.equal(run(True), run(False))


def test_programs_that_were_replayed_in_inference_mode_serve_outside(backend):
    program = Program([Pass((Shift(ALONG, 1.0),), (ALONG,), (1.0,), 0.5, 0.1)])
    results = []
    for inside in (True, False):
        w = torch.zeros(6)
        with torch.inference_mode(inside):
            replay_([w], program, backend=backend)
        results.append(w)
    assert torch.equal(*results)


def test_base_weights_do_not_ask_for_the_default_device(tmp_path):
    model = torch.nn.Linear(3, 2).requires_grad_(False)
    other = torch.nn.Linear(3, 2).requires_grad_(False)
    optimizer = HybridZOFO(model.parameters(), mode="zo", lr=1e-3)
    with default_device("meta"):
        save_base_weights(optimizer, model, tmp_path)
        load_base_weights(other, tmp_path)
    assert torch.equal(model.weight, other.weight)
