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


def _forms(name: str) -> list[str]:
    """A parameter's name, and the names without what peft adds to that of the base model."""
    plain = without_layers(name)
    return [name, *(plain.removeprefix(w) for w in _WRAPPERS if plain.startswith(w))]


def match_names(names: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    """For each name its like in ``available``, with or without peft's parts, if there is one."""
    exact = set(available)
    known: dict[str, str] = {}
    for name in available:
        for form in _forms(name):
            known.setdefault(form, name)
    found: dict[str, str] = {}
    for name in names:
        for form in _forms(name):
            if form in exact or form in known:
                found[name] = form if form in exact else known[form]
                break
    return found
