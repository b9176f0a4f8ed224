"""Losses from elsewhere: ask where to evaluate, tell what was found."""

import copy
import pickle

import numpy as np
import pytest
import torch
from low_rank import MU, PER_EXAMPLE, named, optimizer_of, randn

from zofo_kernels import perturbed
from zofo_optim import HybridZOFO, Journal, replay

PAIRED = dict(PER_EXAMPLE, estimator="antithetic")
X = randn(8, 5, seed=1)
TARGET = randn(8, 4, seed=2)


def weights():
    return named({"w": randn(4, 5, seed=3), "v": randn(4, 4, seed=4), "b": randn(4, seed=5)})


def losses_of(params, rows=slice(None)):
    p = dict(params)
    y = torch.nn.functional.linear(X[rows], p["w"], p["b"]).tanh()
    return (torch.nn.functional.linear(y, p["v"]) - TARGET[rows]).square().sum(1)


def told(params, displaced):
    """Each example evaluated by itself, at weights that are moved there."""
    found = []
    for row, at in enumerate(displaced):
        (shift,) = at.shifts
        moved = [
            (name, perturbed(p, shift.direction, shift.scale, index=i))
            for i, (name, p) in enumerate(params)
        ]
        found.append(losses_of(moved, slice(row, row + 1)).item())
    return found


@pytest.mark.parametrize("each", [1, 2])
def test_asking_and_telling_is_what_a_closure_gives(each):
    ours, theirs = weights(), weights()
    options = dict(PAIRED, examples_per_direction=each, rank=2, lr=1e-3)
    a, b = optimizer_of(ours, **options), optimizer_of(theirs, **options)
    for _ in range(3):
        for _ in range(2):  # micro-batches go on with later directions
            displaced = a.ask(8)
            assert a.ask(8) == displaced
            a.tell(told(ours, displaced))
            b.backward(lambda: losses_of(theirs))
        torch.testing.assert_close(a.accumulated, b.accumulated, rtol=1e-7, atol=1e-9)
        a.step()
        b.step()
        for (_, p), (_, q) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_places_are_directions_then_sides_then_examples():
    optimizer = optimizer_of(weights(), **PAIRED, examples_per_direction=2)
    displaced = optimizer.ask(8)
    assert [(at.direction, at.side) for at in displaced] == [
        *[(0, 1)] * 2,
        *[(0, -1)] * 2,
        *[(1, 1)] * 2,
        *[(1, -1)] * 2,
    ]
    assert [at.shifts[0].scale for at in displaced] == [MU, MU, -MU, -MU] * 2
    assert {at.shifts[0].direction.sample for at in displaced} == {0, 1}


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_scores_may_be_of_any_kind(kind):
    optimizer = optimizer_of(weights(), **PAIRED)
    optimizer.ask(4)
    optimizer.tell(kind([3.0, 1.0, 2.0, 2.5]))
    expected = torch.tensor([[1.0, -0.25]], dtype=torch.float64) / MU / 2
    torch.testing.assert_close(optimizer.accumulated.double(), expected, rtol=1e-6, atol=0)


def test_a_pair_without_a_score_counts_nothing_and_is_counted():
    optimizer = optimizer_of(weights(), **PAIRED)
    optimizer.ask(4)
    optimizer.tell([float("nan"), 1.0, 2.0, 1.0])
    assert optimizer.accumulated[0, 0] == 0
    assert optimizer.accumulated[0, 1] != 0
    assert optimizer.skipped_steps == 1


def test_nothing_changes_before_the_step():
    params = weights()
    before = copy.deepcopy(params)
    optimizer = optimizer_of(params, lr=1e-3, **PAIRED)
    optimizer.ask(8)
    optimizer.tell([*range(8)])
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(params, before, strict=True))
    optimizer.step()
    assert not any(torch.equal(p, q) for (_, p), (_, q) in zip(params, before, strict=True))


def test_journals_have_what_was_told(tmp_path):
    params = weights()
    before = {name: p.detach().clone() for name, p in params}
    optimizer = optimizer_of(params, lr=1e-3, **PAIRED)
    with Journal(tmp_path / "j").attach(optimizer):
        for scores in ([1, 2, 3, 4], [2, 2, 5, 1]):
            optimizer.ask(4)
            optimizer.tell(scores)
            optimizer.step()
    assert replay(before, tmp_path / "j").verified
    assert all(torch.equal(before[name], p) for name, p in params)


def test_what_was_asked_for_ends_with_the_step():
    optimizer = optimizer_of(weights(), **PAIRED)
    with pytest.raises(RuntimeError, match="call ask"):
        optimizer.tell([1.0, 2.0])
    state = optimizer.state_dict()
    optimizer.ask(2)
    optimizer.tell([1.0, 2.0])
    with pytest.raises(RuntimeError, match="call ask"):
        optimizer.tell([1.0, 2.0])
    optimizer.ask(2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="goes on"):
        optimizer.tell([1.0, 2.0])
    optimizer.ask(2)
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="goes on"):
        optimizer.tell([1.0, 2.0])
    assert optimizer.accumulated is None


def test_a_copy_can_be_asked():
    optimizer = pickle.loads(pickle.dumps(optimizer_of(weights(), **PAIRED)))
    optimizer.ask(2)
    optimizer.tell([1.0, 2.0])
    optimizer.step()


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([1.0, 2.0], ValueError, "as many as were asked for, 4, got 2"),
        ([1.0, 2.0, 3.0, "a"], TypeError, "scores must be a number for each example"),
        (None, TypeError, "scores must be the losses or scores .* NoneType"),
    ],
)
def test_scores_that_are_none(scores, error, message):
    optimizer = optimizer_of(weights(), **PAIRED)
    optimizer.ask(4)
    with pytest.raises(error, match=message):
        optimizer.tell(scores)
    assert optimizer.accumulated is None
    optimizer.tell([1.0] * 4)  # still asked for


@pytest.mark.parametrize("examples", [0, 3, -2, True, 2.0, None])
def test_examples_are_pairs(examples):
    optimizer = optimizer_of(weights(), **PAIRED)
    with pytest.raises(ValueError, match="examples must be an int > 0 and a multiple of 2"):
        optimizer.ask(examples)


def test_who_cannot_be_asked():
    with pytest.raises(ValueError, match="estimator must be 'antithetic'"):
        optimizer_of(weights(), **PER_EXAMPLE).ask(4)
    p = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="first-order groups only"):
        HybridZOFO([p], lr=1, **PAIRED).ask(4)


def test_nonfinite_raises_where_wanted():
    optimizer = optimizer_of(weights(), nonfinite="raise", **PAIRED)
    optimizer.ask(2)
    with pytest.raises(FloatingPointError, match="finite"):
        optimizer.tell([float("inf"), 1.0])
    assert optimizer.accumulated is None


# ---- verification by another closure ------------------------------------------------------------


def test_verification_by_a_cheaper_closure_serves_the_steps():
    params = weights()
    optimizer = optimizer_of(params, lr=1e-3, **PAIRED)
    cheap, dear = [], []

    def closure():
        dear.append(1)
        return losses_of(params).round().tolist()

    def cheaper():
        cheap.append(1)
        return losses_of(params)

    before = [p.detach().clone() for _, p in params]
    optimizer.verify(cheaper)
    assert len(cheap) > 5
    assert optimizer.accumulated is None
    assert optimizer.last_loss is None
    assert all(torch.equal(p, q) for (_, p), q in zip(params, before, strict=True))
    optimizer.step(closure)
    assert len(dear) == 1


def test_verification_finds_what_the_first_step_would():
    params = weights()
    copied = [(name, p.detach().clone()) for name, p in params]
    optimizer = optimizer_of(params, lr=1e-3, **PAIRED)

    def mixing():
        return losses_of(params) + losses_of(params).sum()

    with pytest.raises(RuntimeError, match="from that example alone"):
        optimizer.verify(mixing)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(params, copied, strict=True))
