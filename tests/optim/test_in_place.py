"""What a step could not restore is restored by the next one, unless someone wrote it anew."""

import pytest
import torch
from torch.nn import Parameter

import zofo_optim.perturbation.in_place as in_place
from zofo_optim import HybridZOFO

MU = 0.5


def problem():
    params = [Parameter(torch.linspace(0.5, 1.5, n), False) for n in (5, 9, 3)]
    groups = [dict(params=[p], mode="zo", lr=1e-3, mu=MU) for p in params]
    return HybridZOFO(groups), params


def closure_over(params):
    return lambda: sum((p**2).sum() for p in params)


@pytest.fixture
def failing(monkeypatch):
    """Restoring passes over the group given here run out of memory."""
    broken = []
    real = in_place.perturb_

    def perturb_(weights, direction, scale, **options):
        position = [getattr(w, "numel", None) for w in getattr(weights, "tensors", weights)]
        if direction is None and broken and position and position[0]() == broken[0]:
            raise MemoryError("injected")
        real(weights, direction, scale, **options)

    monkeypatch.setattr(in_place, "perturb_", perturb_)
    return broken


def displaced_once(failing):
    optimizer, params = problem()
    before = [p.clone() for p in params]
    failing.append(9)
    with pytest.raises(MemoryError, match="injected"):
        optimizer.backward(closure_over(params))
    failing.clear()
    optimizer.zero_grad()
    return optimizer, params, before


def distances(params, before):
    return [(p - b).abs().max().item() for p, b in zip(params, before, strict=True)]


def test_one_group_that_cannot_be_restored_keeps_no_other_from_it(failing):
    _, params, before = displaced_once(failing)
    first, second, third = distances(params, before)
    assert first < 1e-6
    assert third < 1e-6
    assert second > MU / 10


def test_the_next_call_restores_it(failing):
    optimizer, params, before = displaced_once(failing)
    optimizer.backward(closure_over(params))
    assert max(distances(params, before)) < 1e-6


def test_it_is_restored_before_anything_else_although_its_group_has_gone(failing):
    optimizer, params, before = displaced_once(failing)
    del optimizer.param_groups[1]
    optimizer.backward(closure_over(params))
    assert max(distances(params, before)) < 1e-6


def test_weights_that_were_loaded_since_are_left_alone(failing):
    optimizer, params, _before = displaced_once(failing)
    loaded = torch.full((9,), 7.0)
    params[1].copy_(loaded)
    optimizer.backward(closure_over(params))
    assert (params[1] - loaded).abs().max() < 1e-5


def test_storage_that_was_replaced_since_is_left_alone(failing):
    optimizer, params, _before = displaced_once(failing)
    loaded = torch.full((9,), 7.0)
    params[1].data = loaded.clone()
    optimizer.backward(closure_over(params))
    assert (params[1] - loaded).abs().max() < 1e-5


def test_what_fails_again_is_tried_again(failing):
    optimizer, params, before = displaced_once(failing)
    failing.append(9)
    for _ in range(2):
        with pytest.raises(MemoryError):
            optimizer.backward(closure_over(params))
    failing.clear()
    optimizer.backward(closure_over(params))
    assert max(distances(params, before)) < 1e-6


def test_a_closure_that_changes_the_type_is_not_taken_for_a_displacement():
    optimizer, params = problem()
    start = params[0].clone()

    def bad():
        params[0].data = params[0].data.to(torch.int8)
        raise KeyError("bad")

    with pytest.raises((KeyError, TypeError)):
        optimizer.step(bad)
    params[0].data = start.clone()
    optimizer.backward(closure_over(params))
    assert (params[0] - start).abs().max() < 1e-6
