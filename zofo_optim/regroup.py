"""Moving parameters between the groups of an optimizer that is in use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from .freezing import freeze
from .groups_and_state import GroupsAndState

Members = list[tuple[str, Tensor]]
"""Of a group: names and parameters."""


def regroup(
    optimizer: GroupsAndState, members: Sequence[Members], frozen: Collection[Tensor] = ()
) -> None:
    """Give the groups of ``optimizer`` these parameters, between two steps.

    The groups' dictionaries stay, so that schedulers go on with them. A parameter that stays
    first-order keeps its state; one that becomes zeroth-order, or leaves, loses its state and its
    gradient; one that becomes first-order starts afresh, and requires gradients. Frozen ones are
    in a first-order group and do not train: what is saved of the optimizer's parameters has them.
    Directions follow the places of the zeroth-order parameters.

    Args:
        optimizer: whose groups have names.
        members: one list a group, in the groups' order; lists may be empty.
        frozen: those of first-order groups that require no gradient, and lose theirs; they keep
            their state.

    Raises:
        RuntimeError: a closure is running, an estimate waits for its step, or a listener refuses,
            as a journal does.
        ValueError: another number of groups, or parameters that cannot be zeroth-order, or that
            ``fo_optimizer`` does not take; nothing has changed.
    """
    groups = optimizer.param_groups
    if len(members) != len(groups):
        raise ValueError(
            f"members must be one list for each of {len(groups)} groups, got {len(members)}"
        )
    if optimizer.evaluating:
        raise RuntimeError("groups must not be changed inside a closure")
    if optimizer.accumulated is not None:
        raise RuntimeError(
            "an estimate waits for its step, along directions of the groups as they are: call "
            "step() or zero_grad() before parameters go from group to group"
        )
    optimizer._listeners.places_changing()
    before = [(group["params"], group.get("param_names")) for group in groups]
    was_first_order = _first_order(optimizer)
    try:
        for group, inside in zip(groups, members, strict=True):
            group["params"] = [p for _, p in inside]
            group["param_names"] = [name for name, _ in inside]
        optimizer._check_parameters()
        _try(optimizer)
    except BaseException:
        for group, (params, names) in zip(groups, before, strict=True):
            group["params"] = params
            if names is None:
                del group["param_names"]
            else:
                group["param_names"] = names
        raise
    is_first_order = _first_order(optimizer)
    for key, p in was_first_order.items():
        if key not in is_first_order:
            optimizer.state.pop(p, None)
            p.grad = None
    still = {id(p) for p in frozen}
    for key, p in is_first_order.items():
        if key not in still:
            p.requires_grad_(True)
    freeze(frozen)
    optimizer._fo.rebuild(groups, optimizer.state)  # some classes make state at once


def _try(optimizer: GroupsAndState) -> None:
    """Make the first-order optimizer of the groups as they are now, beside the one in use.

    Raises:
        ValueError: its class takes no parameters such as these.
    """
    first_order = optimizer._fo
    state: defaultdict[Tensor, Any] = defaultdict(dict, optimizer.state)
    first_order.fresh().rebuild(optimizer.param_groups, state)


def _first_order(optimizer: GroupsAndState) -> dict[int, Tensor]:
    groups = (g["params"] for g in optimizer.param_groups if g["mode"] == "fo")
    return {id(p): p for params in groups for p in params}
