"""Matching the names of a model's parameters with those of the model wrapped by peft."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zofo_optim.names import match_names

PLAIN = ["proj.weight", "model.proj.weight", "head.weight", "base_model.proj.weight"]


def tuner(names):
    return ["base_model.model." + n.replace("head.", "head.base_layer.") for n in names] + [
        "base_model.model.head.lora_A.default.weight"
    ]


def prompt(names):
    kept = [n.replace("head.", "head.original_module.") for n in names]
    return ["base_model." + n for n in kept] + ["base_model.head.modules_to_save.default.weight"]


FORMS = {"plain": lambda names: list(names), "tuner": tuner, "prompt": prompt}


@pytest.mark.parametrize("ours", FORMS)
@pytest.mark.parametrize("theirs", FORMS)
def test_same_names_at_several_levels(ours, theirs):
    """Each weight finds its own, also where a wrapper's name is that of a part."""
    names, available = FORMS[ours](PLAIN)[: len(PLAIN)], FORMS[theirs](PLAIN)
    assert match_names(names, available) == dict(zip(names, available, strict=False))


part = st.sampled_from(["model", "base_model", "proj", "base_layer", "a"])
name = st.lists(part, min_size=1, max_size=4).map(lambda parts: ".".join([*parts, "weight"]))


@given(st.lists(name, unique=True), st.lists(name, unique=True))
def test_no_two_names_get_the_same(names, available):
    found = match_names(names, available)
    assert set(found) <= set(names)
    assert set(found.values()) <= set(available)
    assert len(set(found.values())) == len(found)
    if set(names) <= set(available):
        assert found == {name: name for name in names}
