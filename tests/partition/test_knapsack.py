"""The dynamic programme against all sets."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo_optim.partition.knapsack import Item, best_set, cost_of

SMALL = st.integers(0, 12)


@st.composite
def problems(draw, largest=12):
    inputs = draw(st.lists(st.integers(0, largest), min_size=1, max_size=3))
    count = draw(st.integers(1, 10))
    items = []
    for _ in range(count):
        shared = draw(st.sampled_from([None, *range(len(inputs))]))
        items.append(
            Item(
                value=draw(st.integers(-3, 20)) / 8,  # sums are exact
                cost=draw(st.integers(0, largest)),
                path=draw(st.integers(0, largest)),
                input=shared,
                input_cost=draw(SMALL) if shared is None else inputs[shared],
            )
        )
    return items, draw(st.integers(0, 8 * largest))


def brute_force(items, budget):
    sets = itertools.chain.from_iterable(
        itertools.combinations(range(len(items)), n) for n in range(len(items) + 1)
    )
    return max(sum(items[i].value for i in s) for s in sets if cost_of(items, s) <= budget)


@settings(deadline=None, max_examples=300)
@given(problems())
def test_small_integers_are_solved_exactly(problem):
    items, budget = problem
    chosen = best_set(items, budget)
    assert cost_of(items, chosen) <= budget
    assert sum(items[i].value for i in chosen) == brute_force(items, budget)


@settings(deadline=None, max_examples=100)
@given(problems(largest=10**12))
def test_few_sets_are_solved_exactly_whatever_their_costs(problem):
    items, budget = problem
    chosen = best_set(items, budget, bins=2**10)
    assert cost_of(items, chosen) <= budget
    assert sum(items[i].value for i in chosen) == brute_force(items, budget)


@settings(deadline=None, max_examples=100)
@given(problems(), st.integers(1, 20))
def test_with_few_bins_the_budget_holds(problem, bins):
    items, budget = problem
    chosen = best_set(items, budget, bins)
    assert cost_of(items, chosen) <= budget
    value = sum(items[i].value for i in chosen)
    assert 0 <= value <= brute_force(items, budget)


def test_many_tensors_are_nearly_solved():
    """Small tensors fill no bins that they do not need: 300 of them, 3 a thousandth each."""
    items = [Item(value=1.0, cost=999, path=1) for _ in range(300)]
    assert len(best_set(items, 200_000)) == 200
    assert len(best_set(items, 300_000)) == 300


def test_an_input_is_paid_once_though_its_tensors_are_apart():
    items = [
        Item(1.0, 1, 0, input=7, input_cost=10),
        Item(1.5, 3, 0),
        Item(1.0, 1, 0, input=7, input_cost=10),
    ]
    assert cost_of(items, {0, 2}) == 12
    assert best_set(items, 12) == {0, 2}
    assert best_set(items, 11) == {1}
    assert best_set(items, 15) == {0, 1, 2}


def test_a_lower_tensor_is_reached_at_the_price_of_the_path():
    items = [Item(1.0, 2, path=0), Item(1.5, 2, path=5), Item(4.0, 2, path=5)]
    assert best_set(items, 6) == {0}
    assert best_set(items, 8) == {1}
    assert best_set(items, 11) == {0, 1}
    assert best_set(items, 12) == {2}
    assert best_set(items, 14) == {1, 2}


@pytest.mark.parametrize(
    ("items", "bins", "message"),
    [
        ([Item(1.0, -1)], 10, "costs >= 0"),
        ([Item(float("nan"), 1)], 10, "finite values"),
        ([Item(1.0, 1, 0, 0, 3), Item(1.0, 1, 0, 0, 4)], 10, "agree about the cost"),
        ([Item(1.0, 1)], 0, "bins must be an int >= 1, got 0"),
    ],
)
def test_refusals(items, bins, message):
    with pytest.raises(ValueError, match=message):
        best_set(items, 10, bins)


def test_nothing_fits():
    assert best_set([Item(1.0, 5)], 4) == frozenset()
    assert best_set([Item(0.0, 0)], 4) == frozenset()
    assert best_set([], 4) == frozenset()
