"""A parameter's names: in a model, and in the same model wrapped by peft."""

from __future__ import annotations

from collections.abc import Iterable

_WRAPPERS = ("", "base_model.model.", "base_model.")  # none, tuners, prompt learning
_LAYERS = (".base_layer.", ".original_module.")


def without_layers(name: str) -> str:
    """A base parameter's name without the layers that peft puts around it."""
    for layer in _LAYERS:
        name = name.replace(layer, ".")
    return name


def _stripped(names: Iterable[str], wrapper: str) -> dict[str, str]:
    """Names by what is left of them without the wrapper and without layers."""
    return {
        without_layers(name).removeprefix(wrapper): name
        for name in names
        if name.startswith(wrapper)
    }


def match_names(names: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    """For each name its like in ``available``, with or without peft's parts, if there is one.

    No two names get the same one: wrappers are taken off all names alike, in the way that finds
    the most.
    """
    names, available = list(names), list(available)
    there = set(available)
    best = {name: name for name in names if name in there}
    for ours in _WRAPPERS:
        sources = _stripped(names, ours)
        for theirs in _WRAPPERS:
            targets = _stripped(available, theirs)
            found = {name: targets[form] for form, name in sources.items() if form in targets}
            if len(found) > len(best):
                best = found
    return best
