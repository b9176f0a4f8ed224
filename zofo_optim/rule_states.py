"""What a rule remembers of each zeroth-order group, from step to step.

It is in the group's dictionary, as the step is, so that it follows the group wherever that goes:
the rule's name, and its numbers. These become scalars on the device of the coefficients where
they are first needed, and are then written in place, so that a captured graph goes on with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .capture import capturing
from .checks import caller_level
from .rules import Rule, State, described, widest
from .zo_groups import ZOGroup

KEY = "zo_rule_state"
"""Of every ZO group, but with plain SGD."""


def begin(rule: Rule, options: dict[str, Any]) -> None:
    """Give a group what the rule remembers before its first step, unless it goes on with more."""
    if described(rule) == "sgd":
        options.pop(KEY, None)
    elif not _fits(rule, options.get(KEY)):
        options[KEY] = {"rule": described(rule), **rule.init()}


def _fits(rule: Rule, state: dict[str, Any] | None) -> bool:
    """Whether it is of this rule, perhaps with other options."""
    if state is None or {*state} != {"rule", *rule.init()}:
        return False
    ours, theirs = described(rule), str(state["rule"])
    return ours.partition("(")[0] == theirs.partition("(")[0]


# ---- a step -----------------------------------------------------------------------------------


def shaped(
    rule: Rule, groups: Sequence[ZOGroup], rows: Iterable[Tensor]
) -> tuple[list[Tensor], list[State]]:
    """Coefficients after the rule, and what to :func:`keep` once they are applied.

    Args:
        rule: of all groups.
        groups: those that have coefficients, in order.
        rows: their coefficients, each of shape (samples,).

    Raises:
        ValueError: the rule needs more samples, or is not as :class:`Rule` says.
        RuntimeError: the states would be made while a graph is captured.
    """
    found = [_shaped(rule, group.options, row) for group, row in zip(groups, rows, strict=True)]
    return [coefficients for coefficients, _ in found], [state for _, state in found]


def _shaped(rule: Rule, options: dict[str, Any], coefficients: Tensor) -> tuple[Tensor, State]:
    if coefficients.numel() < rule.min_samples:
        warnings.warn(
            f"zo_rule {rule!r} compares the samples of a step, of which it needs "
            f"{rule.min_samples}, and this one has {coefficients.numel()}: it moves no weight by "
            "them (a last batch of so few examples: drop_last=True)",
            stacklevel=caller_level(),
        )
        return torch.zeros_like(coefficients), _there(rule, options, coefficients.device)
    state = _there(rule, options, coefficients.device)
    returned = rule.update(coefficients, state)
    kinds = (Tensor, Mapping)
    pair = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
    if not all(map(isinstance, pair, kinds)):
        raise TypeError(
            f"zo_rule {rule!r} must return coefficients, a tensor, and its state, a mapping, got "
            f"{returned!r:.200}"
        )
    found, after = returned
    # now, as it must not come to light once weights are changing
    if (found.shape, found.dtype) != (coefficients.shape, coefficients.dtype):
        raise ValueError(
            f"zo_rule {rule!r} must keep the coefficients' shape and dtype, got "
            f"{tuple(found.shape)} and {found.dtype} for {tuple(coefficients.shape)} and "
            f"{coefficients.dtype}"
        )
    scalars = [name for name, value in after.items() if value.dim() == 0]
    if sorted(scalars) != sorted(state) or len(scalars) != len(after):
        raise ValueError(
            f"zo_rule {rule!r} must return 0-dim tensors of the names of its init(), "
            f"{list(state)}, got {list(after)}"
        )
    return found, after


def _there(rule: Rule, options: dict[str, Any], device: torch.device) -> State:
    """The group's state, on the device, to be written in place later."""
    begin(rule, options)
    kept = options.get(KEY, {})
    for name in rule.init():
        value = kept[name]
        if isinstance(value, Tensor) and value.device == device:
            continue
        if capturing():
            raise RuntimeError(
                "run a few steps before capturing one in a CUDA graph, as for any optimizer: "
                "the state of zo_rule is made in the first"
            )
        if isinstance(value, Tensor):
            kept[name] = value.to(device, widest(device))
        else:  # unlike torch.tensor, this waits for no device
            kept[name] = torch.full((), value, dtype=widest(device), device=device)
    return {name: kept[name] for name in rule.init()}


def keep(groups: Sequence[ZOGroup], states: Iterable[State]) -> None:
    """The update was applied: the first groups go on from these states."""
    for group, state in zip(groups, states, strict=False):
        for name, value in state.items():
            group.options[KEY][name].copy_(value)


# ---- state dicts ------------------------------------------------------------------------------


def of(param_groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is remembered of each ZO group, in order."""
    return [group.get(KEY, {}) for group in param_groups if group.get("mode") == "zo"]


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """In plain values, exact. Waits for the device."""
    return {name: v if isinstance(v, str) else float(v) for name, v in state.items()}


def load(
    rule: Rule, param_groups: Iterable[dict[str, Any]], before: Iterable[dict[str, Any]]
) -> tuple[str | None, bool]:
    """Take over what loaded groups have, in the tensors that are there already.

    Args:
        rule: ours.
        param_groups: as they were loaded.
        before: :func:`of` those that they replace.

    Returns:
        The rule that they are of, if they say so; and whether ours found nothing of its own.
    """
    theirs: str | None = None
    anew = False
    zo = (group for group in param_groups if group["mode"] == "zo")
    for group, kept in zip(zo, before, strict=True):
        loaded = group.get(KEY)
        theirs = theirs if loaded is None else loaded.get("rule", theirs)
        anew = anew or bool(rule.init() and not _fits(rule, loaded))
        begin(rule, group)
        if KEY in group:
            for name in rule.init():
                value = kept.get(name)
                if isinstance(value, Tensor):
                    group[KEY][name] = value.fill_(group[KEY][name])
            group[KEY]["rule"] = described(rule)
    return theirs, anew
