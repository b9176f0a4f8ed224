"""Terms that are due for sets of tensors, and their shares by tensor: arithmetic alone."""

from itertools import combinations, pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from zofo_optim.costs.by_tensor import shared_inputs, split
from zofo_optim.costs.counting import Kept
from zofo_optim.costs.derivatives import _terms
from zofo_optim.costs.sets import due, members, summed, union

TENSORS = 5
sets = st.integers(1, 2**TENSORS - 1)


def subsets(places):
    return [frozenset(s) for k in range(len(places) + 1) for s in combinations(places, k)]


@given(st.dictionaries(sets.map(lambda m: frozenset(members(m))), st.integers(-9, 9)))
def test_the_terms_of_a_function_are_found_again(terms):
    places = range(TENSORS)
    flops = {s: sum(f for t, f in terms.items() if t & s) for s in subsets(places)}
    assert dict(_terms(places, flops)) == {t: f for t, f in terms.items() if f}


@given(st.sets(st.integers(0, 9)))
def test_members_of_a_union(places):
    assert list(members(union(1 << k for k in places))) == sorted(places)


@given(st.dictionaries(st.integers(1, 2 ** (TENSORS + 1) - 1), st.integers(-9, 9)), sets)
def test_shares_are_never_less_than_what_is_due(terms, chosen):
    share = split(terms, TENSORS)
    bound = sum(share.path[: chosen.bit_length()]) + sum(share.own[k] for k in members(chosen))
    assert bound >= due(terms, chosen, TENSORS)
    if min(terms.values(), default=0) >= 0:
        assert sum(share.path) + sum(share.own) == sum(terms.values())


single = st.integers(0, TENSORS - 1).map(lambda k: 1 << k)
several = st.frozensets(single, min_size=2)
masks = several | st.frozensets(sets, min_size=1, max_size=3)
kept_items = st.builds(Kept, st.integers(1, 99), masks)


@given(st.lists(kept_items, max_size=8), sets)
def test_shared_inputs_are_paid_once(kept, chosen):
    inputs, rest = shared_inputs(kept, TENSORS)
    share = split(summed((union(i.masks), i.nbytes) for i in rest), TENSORS)

    def bound(of):
        picked = list(members(of))
        once = {inputs.numbers[k]: inputs.nbytes[k] for k in picked}
        path = sum(share.path[: of.bit_length()])
        return path + sum(share.own[k] for k in picked) + sum(once.values())

    exact = sum(item.nbytes for item in kept if union(item.masks) & chosen)
    assert bound(chosen) >= exact
    assert bound(2**TENSORS - 1) == sum(item.nbytes for item in kept)


@given(st.lists(st.builds(Kept, st.integers(1, 99), several), min_size=2, max_size=3))
@example([Kept(9, frozenset([0b0001, 0b1000])), Kept(5, frozenset([0b0010, 0b0100]))])
def test_no_two_inputs_interleave(kept):
    numbers = [n for n in shared_inputs(kept, TENSORS)[0].numbers if n is not None]
    changes = sum(a != b for a, b in pairwise(numbers))
    assert changes + bool(numbers) == len(set(numbers))


def test_what_is_always_due_needs_a_choice():
    assert due({1 << 2: 5, 1: 3}, 0, 2) == 0
    assert due({1 << 2: 5, 1: 3}, 0b10, 2) == 5
    assert due({1 << 2: 5, 1: 3}, 0b01, 2) == 8
