"""Moving parameters between the groups of an optimizer that is in use."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .groups_and_state import GroupsAndState

Members = list[tuple[str, Tensor]]
"""Of a group: names and parameters."""


def regroup(optimizer: GroupsAndState, members: Sequence[Members]) -> None:
    """Give the groups of ``optimizer`` these parameters, between two steps.

    The groups' dictionaries stay, so that schedulers go on with them. A parameter that stays
    first-order keeps its state; one that becomes zeroth-order, or leaves, loses its state and its
    gradient; one that becomes first-order starts afresh, and requires gradients. Directions follow
    the places of the zeroth-order parameters.

    Args:
        optimizer: whose groups have names.
        members: one list a group, in the groups' order; lists may be empty.

    Raises:
        RuntimeError: a closure is running, an estimate waits for its step, or a listener refuses,
            as a journal does.
        ValueError: another number of groups, or parameters that cannot be zeroth-order; nothing
            has changed.
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
    for p in is_first_order.values():
        p.requires_grad_(True)
    optimizer._fo.rebuild(groups, optimizer.state)  # some classes make state at once


def _first_order(optimizer: GroupsAndState) -> dict[int, Tensor]:
    groups = (g["params"] for g in optimizer.param_groups if g["mode"] == "fo")
    return {id(p): p for params in groups for p in params}
