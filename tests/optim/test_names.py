"""Matching the names of a model's parameters with those of the model within wrappers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zofo_optim.names import difference, match_names, without_layers

PLAIN = ["proj.weight", "model.proj.weight", "head.weight", "base_model.proj.weight"]


def tuner(names):
    return ["base_model.model." + n.replace("head.", "head.base_layer.") for n in names] + [
        "base_model.model.head.lora_A.default.weight"
    ]


def prompt(names):
    kept = [n.replace("head.", "head.original_module.") for n in names]
    return ["base_model." + n for n in kept] + ["base_model.head.modules_to_save.default.weight"]


def parallel(names):
    """DataParallel, DDP and averaged models alike; each block compiled, too."""
    return ["module." + n.replace("proj.", "proj._orig_mod.") for n in names]


def compiled(names):
    return ["_orig_mod." + n for n in names]


def compiled_tuner_in_parallel(names):
    return parallel(compiled(tuner(names)))


FORMS = {
    "plain": lambda names: list(names),
    "tuner": tuner,
    "prompt": prompt,
    "parallel": parallel,
    "averaged": lambda names: parallel(parallel(names)),
    "compiled": compiled,
    "all": compiled_tuner_in_parallel,
}


@pytest.mark.parametrize("ours", FORMS)
@pytest.mark.parametrize("theirs", FORMS)
def test_same_names_at_several_levels(ours, theirs):
    """Each weight finds its own, also where a wrapper's name is that of a part."""
    names, available = FORMS[ours](PLAIN)[: len(PLAIN)], FORMS[theirs](PLAIN)
    assert match_names(names, available) == dict(zip(names, available, strict=False))


part = st.sampled_from(["model", "base_model", "proj", "base_layer", "a", "module", "_orig_mod"])
name = st.lists(part, min_size=1, max_size=4).map(lambda parts: ".".join([*parts, "weight"]))


@given(st.lists(name, unique=True), st.lists(name, unique=True), st.booleans())
def test_no_two_names_get_the_same(names, available, heads):
    found = match_names(names, available, heads=heads)
    assert set(found) <= set(names)
    assert set(found.values()) <= set(available)
    assert len(set(found.values())) == len(found)
    if set(names) <= set(available):
        assert found == {name: name for name in names}


@given(name)
def test_what_is_left_is_a_name(name):
    bare = without_layers(name)
    assert bare.endswith("weight")
    assert without_layers(bare) == bare
    assert "_orig_mod" not in bare


def test_layers_within_layers():
    assert without_layers("a.base_layer.base_layer.weight") == "a.weight"
    assert without_layers("base_layer.a.weight") == "base_layer.a.weight"  # the user's own
    assert without_layers("_orig_mod.weight") == "weight"


def test_differences_of_lists():
    ours = ["a.weight", "b.weight", "c.weight"]
    assert difference(ours, ours) is None
    assert difference(ours, compiled(ours)) is None
    assert difference(compiled(ours), parallel(ours)) is None
    said = difference(ours, ["a.weight", "c.weight", "b.weight"])
    assert said == "'c.weight' at place 1, which is at another place here, where 'b.weight' is"
    said = difference(ours, ["module.a.weight", "module.b.weight", "module.d.weight"])
    assert said == "'module.d.weight' at place 2, which is not here, where 'c.weight' is"
    assert difference(ours, ours[:2]) == "2 names, not 3"
    assert difference(ours, ["a.weight", "x", "y"], renamed=True) is None
    assert difference(ours, ["a.weight", "x", "b.weight"], renamed=True) is not None


@pytest.mark.parametrize("ours", FORMS)
@pytest.mark.parametrize("theirs", FORMS)
def test_a_model_without_its_head(ours, theirs):
    names = ["bert.a.weight", "bert.b.weight", "bert.proj.weight", "head.weight"]
    body = [name.removeprefix("bert.") for name in names[:3]]
    whole, bare = FORMS[ours](names)[: len(names)], FORMS[theirs](body)[: len(body)]
    assert match_names(whole, bare, heads=True) == dict(zip(whole, bare, strict=False))
    assert match_names(bare, whole, heads=True) == dict(zip(bare, whole, strict=False))
    assert match_names(whole, bare) == {}
