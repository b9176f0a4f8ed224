"""Which tokens are taken of texts, and activations that cannot be mapped."""

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo_optim.transfer import transfer_adapter
from zofo_optim.transfer.activations import inputs_of, positions
from zofo_optim.transfer.intact import all_or_nothing

TEXTS = families.texts(count=6)


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=6), st.integers(1, 40), st.integers(0, 2**20)
)
@settings(max_examples=60)
def test_one_text_in_four_is_held_out(rows, tokens, seed):
    batches = [families.texts(1, rows=n, seed=i)[0] for i, n in enumerate(rows)]
    texts, real = sum(rows), sum(int(batch["attention_mask"].sum()) for batch in batches)
    if texts < 4:
        with pytest.raises(ValueError, match=f"at least 4 texts.* got {texts}"):
            positions(batches, tokens, seed)
        return
    places = positions(batches, tokens, seed)
    held = torch.cat([place.held for place in places])
    some = torch.cat([place.tokens.any(1) for place in places])
    assert held.sum() == texts // 4
    assert sum(int(place.tokens.sum()) for place in places) == min(tokens, real)
    for place, batch in zip(places, batches, strict=True):
        assert not (place.tokens & (batch["attention_mask"] == 0)).any()
    assert (held & some).any()
    if some.sum() > 1:
        assert (~held & some).any()
    for place, again in zip(places, positions(batches, tokens, seed), strict=True):
        assert torch.equal(place.tokens, again.tokens)
        assert torch.equal(place.held, again.held)


def test_held_texts_are_drawn_by_the_seed():
    """No period of the texts falls in with them."""
    drawn = {tuple(torch.cat([p.held for p in positions(TEXTS, 99, s)]).tolist()) for s in range(9)}
    assert len(drawn) > 5
    for seed in range(9):
        held = torch.cat([place.held for place in positions(TEXTS, 99, seed)]).nonzero()[:, 0]
        assert len(set((held % 4).tolist())) > 1


IDS = torch.ones(4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (IDS, TypeError, "must be mappings with input_ids.* got Tensor"),
        (dict(input_ids=IDS.tolist()), TypeError, "input_ids that are a tensor.* got list"),
        (dict(attention_mask=IDS), TypeError, "input_ids that are a tensor.* got NoneType"),
        (dict(input_ids=IDS[0]), ValueError, r"input_ids of shape \(texts, tokens\), got \(3,\)"),
        (
            dict(input_ids=IDS, attention_mask=IDS[:, None, None]),
            ValueError,
            r"attention_mask of shape \(texts, tokens\), got \(4, 1, 1, 3\)",
        ),
        (
            dict(input_ids=IDS, attention_mask=IDS[:, :2]),
            ValueError,
            r"got \(4, 2\) with input_ids of \(4, 3\)",
        ),
        (
            dict(input_ids=IDS, attention_mask=IDS.tolist()),
            ValueError,
            r"attention_mask of shape \(texts, tokens\), got list",
        ),
        (dict(input_ids=IDS, attention_mask=0 * IDS), ValueError, "one token .* got none"),
    ],
)
def test_batches_that_are_refused(batch, error, message):
    with pytest.raises(error, match=message):
        positions(inputs_of([batch]), 10, 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite(bad):
    """The first module that has them is named."""
    model = families.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0] = bad
    small = families.with_lora(model, target_modules=["up_proj", "down_proj"])
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.down_proj' must have finite"):
        transfer_adapter(small, families.llama(), TEXTS)


def test_rows_of_which_none_is_held_out():
    small = families.with_lora(families.llama(), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.* rows .* held out"):
        transfer_adapter(small, families.llama(seed=1), TEXTS, tokens=1)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.* rows .* held out"):
        transfer_adapter(small, families.llama(seed=1), TEXTS, tokens=1, width="same")
    with pytest.raises(ValueError, match=r"'model\.layers\.0'.* rows .* held out"):
        transfer_adapter(small, families.llama(seed=1), TEXTS, tokens=1, layers="similar")


@pytest.mark.parametrize("width", ["least_squares", "procrustes"])
def test_maps_that_carry_nothing(width):
    """A layer that adds nothing to the stream cannot tell where a change of it goes."""
    plain = families.llama()
    large, _ = families.deeper(plain, at=(1,))
    small = families.with_lora(plain, target_modules=["down_proj"])
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.down_proj.*{width}.* would be zero"):
        transfer_adapter(small, large, TEXTS, layers={1: 0}, width=width)


def test_maps_from_nothing():
    """The same of the small model's layer."""
    small, _ = families.deeper(families.llama(), at=(1,))
    small = families.with_lora(small, target_modules=["down_proj"])
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj.* would be zero"):
        transfer_adapter(small, families.llama(), TEXTS, layers={0: 1})


@pytest.mark.parametrize("layers", ["similar", "spread"])
def test_what_one_layer_shares_is_decomposed_once(monkeypatch, layers):
    """Query, key and value read the same, and so do gate and up; each writes elsewhere."""
    shapes, true = [], torch.linalg.svd

    def svd(matrix, **options):
        shapes.append(tuple(matrix.shape))
        return true(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    plain = families.llama(layers=1, intermediate=20)
    small = families.with_lora(
        plain, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    )
    large = families.llama(layers=1, hidden=24, intermediate=28, seed=1)
    transfer_adapter(small, large, TEXTS, layers=layers)
    reads, q, k, v, units = (24, 16), (16, 16), (8, 8), (8, 8), (28, 20)
    assert sorted(shapes) == sorted([reads, q, k, v, reads, units, units])


def test_what_fails_leaves_lists_and_inner_configs():
    model = families.llama()
    model.config.names, model.config.inner = ["a"], type(model.config)(num_hidden_layers=3)
    model.names, model.config.inner.names = ["b"], ["c"]
    lists = model.names, model.config.names, model.config.inner.names

    def interrupted():
        with all_or_nothing(model):
            assert not any(p.requires_grad for p in model.parameters())
            for names in lists:
                names.append("more")
            model.config.inner.num_hidden_layers = 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert lists == (["b"], ["a"], ["c"])
    assert model.config.inner.num_hidden_layers == 3
    assert all(p.requires_grad for p in model.parameters())
