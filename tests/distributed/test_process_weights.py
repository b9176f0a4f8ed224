"""Processes whose batches count differently, or have losses that are not finite."""

import itertools
import math

import pytest
import torch
from launch import case, launched, run_cases
from small_nets import (
    OF_EXAMPLES,
    ROWS,
    STREAMED,
    apart,
    batch,
    closure_of,
    network,
    optimizer_of,
    parameters,
    same,
    train,
    wrapped,
)

results = launched(__file__, 2, 4)


SHARES = {2: [3, 5], 4: [1, 4, 0, 3]}
"""Rows of the global batch that each rank has."""


def own_rows(rank, size):
    first = sum(SHARES[size][:rank])
    return slice(first, first + SHARES[size][rank])


@case
def weighted(rank, size):
    model = network()
    call = wrapped(model)
    optimizer = optimizer_of(model)
    for step in range(3):
        x = batch(step)[own_rows(rank, size)]
        optimizer.zero_grad()
        # a process without rows takes others', and counts nothing
        optimizer.step(closure_of(call, x if len(x) else batch(9)), weight=len(x))
    return parameters(model)


def test_batches_of_different_size(results):
    model = network()
    once = train(model, model, slice(None), steps=3)
    assert apart(results["weighted"][0], once) < 1e-10
    assert all(same(found, results["weighted"][0]) for found in results["weighted"])


@case
def weighted_means_of_examples(rank, size):
    """The mean of the last process counts three times as much, that of the first nothing."""
    weights = [0, *[1] * (size - 2), 3]
    model = network()
    call = wrapped(model)
    optimizer = optimizer_of(model, **OF_EXAMPLES)
    closure = closure_of(call, batch(0)[rank::size], of_examples=True)
    optimizer.step(closure, weight=weights[rank])
    return parameters(model)


def test_weights_of_means_of_examples(results):
    size = results.size
    model = network()
    optimizer = optimizer_of(model, **OF_EXAMPLES)
    weights = torch.tensor([0.0, *[1.0] * (size - 2), 3.0], dtype=torch.float64)
    factors = (size * weights / weights.sum()).repeat(ROWS // size)
    optimizer.step(lambda: model(batch(0)).square().flatten() * factors)
    assert apart(results["weighted_means_of_examples"][0], parameters(model)) < 1e-10


@case
def weighted_examples(rank, size):
    """Dealt by turns, the last ranks have an example less."""
    model = network()
    call = wrapped(model)
    optimizer = optimizer_of(model, **OF_EXAMPLES)
    for step in range(3):
        x = batch(step)[:7][rank::size]
        optimizer.zero_grad()
        optimizer.step(closure_of(call, x, of_examples=True), weight=len(x))
    return parameters(model)


def test_examples_of_batches_of_different_size(results):
    model = network()
    once = train(model, model, slice(7), steps=3, **OF_EXAMPLES)
    assert apart(results["weighted_examples"][0], once) < 1e-10


@case
def wrong_weights(rank, size):
    model = network()
    for weight in (-1, math.nan, "1", True):
        with pytest.raises((TypeError, ValueError), match="weight must be"):
            optimizer_of(model).step(closure_of(model, batch(0)), weight=weight)
    with pytest.raises(ValueError, match=r"weight must be a finite number >= 0 in every process"):
        optimizer_of(model).step(closure_of(model, batch(0)), weight=0)
    for wrong, match in ((-1, "weight must be a finite"), (None, "another given than rank 0")):
        with pytest.raises((ValueError, RuntimeError), match=match):  # of one process, in all
            optimizer_of(model).step(closure_of(model, batch(0)), weight=1 if rank else wrong)
    call = wrapped(model)

    def own_backward():
        loss = call(batch(0)).square().mean()
        loss.backward()
        return loss

    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match=r"leave backward to the optimizer where weight differs"):
        optimizer.step(own_backward, weight=1 + rank)
    optimizer.zero_grad()
    optimizer.step(own_backward, weight=3)
    for order, match in (("contiguous", "as many losses"), ("interleaved", "dealt by turns")):
        x = batch(0)[: 3 if rank == 0 else 6]
        optimizer = optimizer_of(model, **OF_EXAMPLES, example_order=order)
        with pytest.raises(ValueError, match=match):
            optimizer.step(closure_of(call, x, of_examples=True))
        optimizer.zero_grad()
    x = batch(0)[: 6 if rank == 0 else 5]
    with pytest.raises(ValueError, match=r"weight must be given where processes have batches"):
        optimizer_of(model, **OF_EXAMPLES).step(closure_of(call, x, of_examples=True))


def test_weights_that_cannot_be(results):
    results["wrong_weights"]


# ---- losses that are not finite ---------------------------------------------------------------


@case
def not_finite_somewhere(rank, size):
    model = network()
    call = wrapped(model)
    optimizer = optimizer_of(model)
    before = parameters(model)
    factor = math.nan if rank == size - 1 else 1.0
    optimizer.step(lambda: call(batch(0)).square().mean() * factor)
    kept = apart(parameters(model), before) < 1e-14  # moves round
    optimizer.zero_grad()
    optimizer.step(closure_of(call, batch(1)[rank::size]))
    return kept, optimizer.skipped_steps, parameters(model)


def test_a_loss_that_is_not_finite_in_one_process_is_skipped_in_all(results):
    every = results["not_finite_somewhere"]
    assert [kept for kept, _, _ in every] == [True] * results.size
    assert [skipped for _, skipped, _ in every] == [1] * results.size
    assert all(same(found, every[0][2]) for _, _, found in every)


@case
def displaced_not_finite(rank, size):
    """At one displaced point, in one process."""
    model = network()
    call = wrapped(model)
    optimizer = optimizer_of(model, coupling=0.5, **STREAMED)
    optimizer.step(closure_of(call, batch(0)[rank::size]))  # which has a run of checks
    before, runs = parameters(model), itertools.count()

    def closure():
        bad = next(runs) == 1 and rank == size - 1
        return call(batch(1)[rank::size]).square().mean() * (math.nan if bad else 1.0)

    optimizer.zero_grad()
    optimizer.step(closure)
    found = parameters(model)
    optimizer.zero_grad()
    optimizer.step(closure_of(call, batch(2)[rank::size]))
    return before, found, parameters(model)


def test_a_coupled_loss_that_is_not_finite_in_one_process_is_left_out_in_all(results):
    every = results["displaced_not_finite"]
    for before, found, after in every:
        assert all(p.isfinite().all() for p in after)
        assert same(found, every[0][1])
        assert same(after, every[0][2])
        assert not torch.equal(before[-1], found[-1])  # the clean loss trains the head


@case
def raised(rank, size):
    model = network(hybrid=False)
    optimizer = optimizer_of(model, nonfinite="raise")
    with pytest.raises(FloatingPointError):
        optimizer.step(lambda: model(batch(0)).mean() * (math.inf if rank == 0 else 1))


def test_raised_in_all(results):
    results["raised"]


if __name__ == "__main__":
    run_cases()
