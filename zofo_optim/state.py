"""What state dicts hold beside torch's own: accumulation, moves, and the settings of their path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .estimate import Estimate
from .moves import Moves
from .names import difference
from .plain import make_plain
from .rule_states import KEY, saved
from .settings import Settings


def add(
    state: dict[str, Any], settings: Settings, estimate: Estimate | None, moves: Moves
) -> dict[str, Any]:
    """torch's state dict with ours in its groups: the first ZO group, or the first of all."""
    zo = [group for group in state["param_groups"] if group.get("mode") == "zo"]
    for group in state["param_groups"]:
        make_plain(group)  # schedules set what they computed
        if isinstance(group.get("zo_step"), Tensor):
            group["zo_step"] = int(group["zo_step"])
    for group in zo:
        group["zo_settings"] = settings.of_the_path()
        if KEY in group:
            group[KEY] = saved(group[KEY])
    pending = None if estimate is None else estimate.saved()
    if pending is not None:
        (zo or state["param_groups"])[0]["zo_pending"] = pending
    if zo and moves:
        zo[0]["zo_path"] = moves.saved()
    # again, for torch.distributed.checkpoint: it loads only keys that are there before
    for position, group in enumerate(zo):
        group["zo_in_flight"] = (None, []) if position else (pending, moves.saved())
    return state


def take(
    groups: Sequence[dict[str, Any]],
) -> tuple[Estimate | None, Moves, dict[str, Any]]:
    """What :func:`add` put into loaded groups, and takes out again: estimate, moves, settings."""
    estimate: Estimate | None = None
    moves = Moves()
    settings: dict[str, Any] = {}
    for group in groups:
        pending, path = group.pop("zo_in_flight", (None, ()))
        pending = group.pop("zo_pending", pending)
        if pending is not None:
            estimate = Estimate.loaded(pending, group["params"][0].device)
        settings = group.pop("zo_settings", settings)
        if path := group.pop("zo_path", path):
            moves = Moves.loaded(path)
    return estimate, moves, settings


def check_same_modes(
    current: Sequence[Mapping[str, Any]] | None, loaded: Sequence[Mapping[str, Any]]
) -> None:
    """Raise ValueError where a state dict's groups have other modes than ours."""
    for position, (ours, theirs) in enumerate(zip(current or (), loaded, strict=False)):
        mode = theirs.get("mode", "fo")  # a torch.optim state dict has no modes
        if mode != ours["mode"]:
            raise ValueError(
                f"state_dict must have the same modes, got mode={mode!r} for parameter group "
                f"{position}, which has mode={ours['mode']!r}"
            )


def check_same_names(
    current: Sequence[dict[str, Any]] | None, loaded: Sequence[dict[str, Any]]
) -> None:
    """Raise ValueError where a state dict has the parameters of our names in another order.

    State and directions go by a parameter's place. As in torch, names that are not ours are taken;
    where no more than a wrapper's part differs, ours stay.
    """
    for position, (ours, theirs) in enumerate(zip(current or (), loaded, strict=False)):
        names, others = ours.get("param_names"), theirs.get("param_names")
        if names is None or others is None:
            continue
        found = difference(names, others, renamed=True)
        if found is not None:
            raise ValueError(
                f"state_dict must have the parameters of group {position} in the same order, but "
                f"has {found}; construct the groups as they were when it was saved, or take "
                "'param_names' out of its groups to load it by place"
            )
        if difference(names, others) is None:
            theirs["param_names"] = names


def emptied(
    current: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]
) -> list[tuple[int, dict[str, Any]]]:
    """Groups without parameters of a state dict, which ours has not; with their positions.

    Repartitioning empties groups, and groups that are made anew have none without parameters.
    """
    left = list(current)
    if len(loaded) <= len(left):
        return []
    found = []
    for position, theirs in enumerate(loaded):
        same = left and left[0]["mode"] == theirs.get("mode", "fo")
        if not theirs["params"] and not (same and not left[0]["params"]):
            found.append((position, dict(theirs)))
        elif left:
            left.pop(0)
    return found if len(found) == len(loaded) - len(current) else []


def fill_defaults(groups: Sequence[dict[str, Any]], defaults: Mapping[str, Any]) -> None:
    """Options that a state dict of another optimizer, or of an older version, lacks."""
    for group in groups:
        group.setdefault("mode", "fo")
        for name, default in defaults.items():
            group.setdefault(name, default)
