"""Which layer takes whose adapter: maps keep the order, and "similar" is the best that does."""

import itertools

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo_optim.transfer.layers import layer_map, linear_cka, stack_of

COUNTS = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, 40)))


@given(COUNTS)
def test_spread(counts):
    """Each small layer has one large layer, in order, at distances that differ by one at most."""
    small, large = counts
    found = layer_map("spread", small, large)
    assert list(found.values()) == list(range(small))
    places = list(found)
    assert places == sorted(set(places))
    assert places[-1] == large - 1
    if small > 1:
        assert places[0] == 0
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert max(gaps) - min(gaps) <= 1
    assert layer_map(None, small, large) == found


@given(st.integers(1, 40), st.integers(1, 40))
def test_nearest(small, large):
    """Each large layer has a small one, in order; all are used where there is room."""
    found = layer_map("nearest", small, large)
    assert list(found) == list(range(large))
    sources = list(found.values())
    assert sources == sorted(sources)
    assert set(sources) <= set(range(small))
    if small <= large:
        assert set(sources) == set(range(small))
    assert sources[-1] == small - 1
    assert layer_map(None, small, large, every=True) == found
    for j, i in found.items():
        if small > 1 and large > 1:
            assert abs(i / (small - 1) - j / (large - 1)) <= 0.5 / (small - 1) + 1e-9


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 2**20))
@settings(max_examples=40)
def test_similar_is_the_best_of_all_maps(small, more, seed):
    """Against all of them; both kinds, with ties."""
    large = small + more
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(0, 4, (small, large), generator=generator) / 4

    def worth(pairs):
        return sum(float(similarity[i, j]) for j, i in pairs.items())

    found = layer_map("similar", small, large, similarity=similarity)
    assert list(found) == sorted(found)
    assert list(found.values()) == list(range(small))
    one_to_one = [
        dict(zip(places, range(small), strict=True))
        for places in itertools.combinations(range(large), small)
    ]
    assert worth(found) == max(map(worth, one_to_one))

    found = layer_map("similar", small, large, every=True, similarity=similarity)
    assert list(found) == list(range(large))
    assert list(found.values()) == sorted(found.values())
    covering = [
        dict(enumerate(sources))
        for sources in itertools.combinations_with_replacement(range(small), large)
    ]
    assert worth(found) == max(map(worth, covering))


def test_a_mapping_is_taken_in_order():
    assert list(layer_map({5: 1, 2: 0}, 2, 6).items()) == [(2, 0), (5, 1)]
    assert layer_map({0: 1, 1: 1, 2: 0}, 2, 3, every=True) == {0: 1, 1: 1, 2: 0}


@pytest.mark.parametrize(
    ("layers", "options", "error", "said"),
    [
        ("depth", {}, ValueError, "spread, nearest, similar"),
        (3, {}, TypeError, "policy"),
        ({6: 0}, {}, ValueError, "large model, 0 to 5, got 6"),
        ({5: 2}, {}, ValueError, "small model, 0 to 1, got 2"),
        ({-1: 0}, {}, ValueError, "got -1"),
        ({"5": 0}, {}, TypeError, "'5'"),
        ({True: 0}, {}, TypeError, "True"),
        ({}, {}, ValueError, "at least one"),
        ({0: 0}, {"every": True}, ValueError, r"\[1, 2, 3, 4, 5\]"),
        ("spread", {"every": True}, ValueError, "nearest"),
    ],
)
def test_maps_that_are_refused(layers, options, error, said):
    with pytest.raises(error, match=said):
        layer_map(layers, 2, 6, **options)


@pytest.mark.parametrize("policy", ["spread", "similar"])
def test_more_layers_than_the_large_model_has(policy):
    with pytest.raises(ValueError, match="got 6 layers"):
        layer_map(policy, 6, 2, similarity=torch.ones(6, 2))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**20))
@settings(max_examples=30)
def test_cka(narrow, wide, seed):
    """1 for what differs by a rotation, a scale and an offset; symmetric, from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(30, width, generator=generator) for width in (narrow, wide))
    turned = 3 * x @ torch.linalg.qr(torch.randn(narrow, narrow, generator=generator))[0] + 5
    found = linear_cka([x, y], [turned, y])
    assert found.shape == (2, 2)
    assert found[0, 0] == pytest.approx(1, abs=1e-5)
    assert found[1, 1] == pytest.approx(1, abs=1e-5)
    assert 0 <= found[0, 1] < 1 + 1e-9
    assert linear_cka([y], [x])[0, 0] == pytest.approx(float(found[0, 1]))


def test_cka_of_what_never_changes():
    """Is like nothing, rather than not a number."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert linear_cka([x], [torch.ones(8, 2)]).tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (families.llama, "model.layers"),
        (families.bert, "bert.encoder.layer"),
        (families.gpt2, "transformer.h"),
    ],
)
def test_stacks(make, name):
    stack = stack_of(make(layers=3))
    assert (stack.name, stack.size) == (name, 3)
    assert stack.split(f"{name}.12.mlp.fc") == (12, "mlp.fc")
    assert stack.split(f"{name}2.1.fc") is None
    assert stack.split(stack.layer(1)) == (1, "")


def test_a_model_of_two_stacks():
    config = families.transformers.T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2
    )
    model = families.made(families.transformers.T5ForConditionalGeneration, config, 0)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        stack_of(model)
