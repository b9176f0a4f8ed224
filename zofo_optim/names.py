"""A parameter's names: in a model, in the same model within wrappers, and as patterns of users."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

_PARALLEL = ("", "module.", "module.module.")
"""Data parallelism and averaged models (``swa_utils.AveragedModel``), also one in the other."""
_PEFT = ("", "base_model.model.", "base_model.")  # none, tuners, prompt learning
_WRAPPERS = tuple(outer + inner for outer in _PARALLEL for inner in _PEFT)
_LAYERS = ("base_layer", "original_module")
"""What peft puts around a layer."""
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that torch adds, around a model or a module of it: compiled, sharded, checkpointed."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within torch.compile, DataParallel, DDP or ``AveragedModel``."""
    outer = (
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.optim.swa_utils.AveragedModel,
    )
    children = dict(model.named_children())
    inner = children.get("module" if isinstance(model, outer) else "_orig_mod")
    return model if inner is None else unwrapped(inner)


def within_peft(model: nn.Module) -> nn.Module:
    """The base model that peft has wrapped; the model itself where it has not."""
    of_peft = getattr(model, "get_base_model", None)
    base: nn.Module = of_peft() if callable(of_peft) else model
    return base


def without_layers(name: str) -> str:
    """A base parameter's name without the layers that peft and torch put around it."""
    first, *inside = [part for part in name.split(".") if part not in _ANYWHERE] or [""]
    return ".".join([first, *(part for part in inside[:-1] if part not in _LAYERS), *inside[-1:]])


def _stripped(names: Iterable[str], wrapper: str) -> dict[str, str]:
    """Names by what is left of them without the wrapper; those within it alone."""
    return {name.removeprefix(wrapper): name for name in names if name.startswith(wrapper)}


def _without_head(forms: Mapping[str, str]) -> dict[str, str]:
    """Names by what is left of them without a first part that most have; none where none is.

    That part is the model's name for what is below its head ("bert", "transformer"); a model that
    was saved without a head has the rest alone.
    """
    firsts = Counter(form.partition(".")[0] for form in forms)
    part, count = firsts.most_common(1)[0] if firsts else ("", 0)
    found = {form.removeprefix(f"{part}."): name for form, name in forms.items()}
    return found if 2 * count > len(forms) == len(found) else {}


def layer_of(name: str) -> str:
    """The part of a tensor's name that tells its layer: up to the first number, or its module."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return found[0] if found else name.rpartition(".")[0]


def match_names(
    names: Iterable[str], available: Iterable[str], heads: bool = False
) -> dict[str, str]:
    """For each name its like in ``available``, with or without wrappers' parts, if there is one.

    No two names get the same one: wrappers are taken off all names alike, in the way that finds
    the most. With ``heads``, a model with a head and the one without it match too: what a caller
    finds that way, it must check, as one part less of a name says less.
    """
    names, available = list(names), list(available)
    there = set(available)
    best = {name: name for name in names if name in there}
    if len(best) == len(set(names)):
        return best
    bare = {without_layers(name): name for name in names}
    bare_there = {without_layers(name): name for name in available}
    for ours in _WRAPPERS:
        sources = _stripped(bare, ours)
        for theirs in _WRAPPERS if sources else ():
            targets = _stripped(bare_there, theirs)
            pairs = [(sources, targets)]
            if heads and len(sources) == len(bare) and targets:
                pairs += [(_without_head(sources), targets), (sources, _without_head(targets))]
            for a, b in pairs:
                found = {bare[name]: bare_there[b[form]] for form, name in a.items() if form in b}
                if len(found) > len(best):
                    best = found
    return best


def difference(ours: Sequence[str], theirs: Sequence[str], renamed: bool = False) -> str | None:
    """Where two lists of names differ, wrappers aside, for a message; None where they do not.

    With ``renamed``, a name that is not among ours is another name of what is at its place.
    """
    if list(ours) == list(theirs):
        return None
    where = match_names(theirs, ours)
    for position, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if where.get(other, mine if renamed else None) != mine:
            elsewhere = "at another place" if other in where else "not"
            return f"{other!r} at place {position}, which is {elsewhere} here, where {mine!r} is"
    return None if len(ours) == len(theirs) else f"{len(theirs)} names, not {len(ours)}"


# ---- patterns -----------------------------------------------------------------------------------


def patterns_in(name: str, patterns: str | Sequence[str]) -> list[str]:
    """The patterns that the argument of this name holds, one or several.

    Raises:
        TypeError: it holds something else.
    """
    if isinstance(patterns, str):
        return [patterns]
    found = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    if not all(isinstance(pattern, str) for pattern in found):
        raise TypeError(f"{name} must be a string or a sequence of strings, got {patterns!r}")
    return found


def matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The patterns that match one of a parameter's names.

    Regular expressions are searched in a name, upper or lower case; what is none is a shell
    pattern.
    """

    def matches(pattern: str, name: str) -> bool:
        try:
            return re.search(pattern, name, re.IGNORECASE) is not None
        except re.error:
            return fnmatch.fnmatchcase(name.lower(), pattern.lower())

    return [p for p in patterns if any(matches(p, name) for name in names)]
