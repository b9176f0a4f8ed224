"""Where the tensors of a partition are: in a model, and in an optimizer's groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..groups_and_state import GroupsAndState
from ..names import match_names
from ..zeroth_order import parameters_with_all_names

if TYPE_CHECKING:
    from ..regroup import Members
    from .partition import Partition, Row


def rows_of(partition: Partition, model: nn.Module) -> dict[int, Row]:
    """The rows by the identity of the model's parameters; names may differ by wrappers' parts.

    Raises:
        ValueError: the model lacks one, has one of another shape, or trains one that has no row.
    """
    every = parameters_with_all_names(model)
    known = {name: p for names, p in every for name in names}
    where = match_names([row.name for row in partition.rows], known)
    missing = [row.name for row in partition.rows if row.name not in where]
    found = {id(known[where[row.name]]): row for row in partition.rows if row.name in where}
    extra = [names[0] for names, p in every if p.requires_grad and id(p) not in found]
    if missing or extra:
        parts = [f"lacks {_some(missing)}"] * bool(missing)
        parts += [f"trains {_some(extra)} beside"] * bool(extra)
        raise ValueError(
            f"model must have the tensors of the partition, got one that {' and '.join(parts)}"
        )
    for row in partition.rows:
        shape = tuple(known[where[row.name]].shape)
        if shape != row.shape:
            raise ValueError(
                f"model must have tensors of the partition's shapes, got {shape} for "
                f"{row.name!r}, which has {row.shape}"
            )
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more


def in_order(partition: Partition, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those without a row as they are, then the others, farthest from the loss first.

    So a group's order depends on the partition alone, not on those before it.
    """
    where = match_names([row.name for row in partition.rows], parameters)
    listed = [where[row.name] for row in partition.rows[::-1] if row.name in where]
    with_rows = set(listed)
    order = [name for name in parameters if name not in with_rows] + listed
    return {name: parameters[name] for name in order}


def members(
    partition: Partition,
    optimizer: GroupsAndState,
    model: nn.Module | None,
    place: Callable[[str, Tensor, str], int] | None,
) -> list[Members]:
    """What the groups of ``optimizer`` hold by this partition; see :meth:`Partition.apply`."""
    if not isinstance(optimizer, GroupsAndState):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a HybridZOFO, without a wrapper, got {kind}")
    groups = optimizer.param_groups
    for position, group in enumerate(groups):
        if group["params"] and "param_names" not in group:
            raise ValueError(
                "optimizer must have groups with param_names, as hybrid_param_groups makes them, "
                f"got none in group {position}"
            )
    inside: dict[str, tuple[int, Tensor]] = {}
    for position, group in enumerate(groups):
        named = zip(group.get("param_names", ()), group["params"], strict=True)
        inside |= {name: (position, p) for name, p in named}
    outside: dict[str, Tensor] = {} if model is None else dict(model.named_parameters())
    found: list[dict[str, Tensor]] = [{} for _ in groups]
    where = match_names([row.name for row in partition.rows], [*inside, *outside])
    rows = {where[row.name]: row for row in partition.rows if row.name in where}
    for name, (position, p) in inside.items():
        if name not in rows:
            found[position][name] = p
    for row in partition.rows:
        name = where.get(row.name, row.name)
        at, tensor = inside.get(name, (-1, outside.get(name)))
        if row.mode == "frozen" or (row.mode == "zo" and tensor is None):
            continue
        if tensor is None:
            raise ValueError(
                "model must be given where a tensor becomes first-order that is in no group of the "
                f"optimizer, got {'None' if model is None else 'one without it'}, and "
                f"{row.name!r} is one"
            )
        if at < 0 or groups[at]["mode"] != row.mode:
            at = _group_for(name, tensor, row.mode, groups, place)
        found[at][name] = tensor
    return [list(in_order(partition, one).items()) for one in found]


def _group_for(
    name: str,
    p: Tensor,
    mode: str,
    groups: list[dict[str, Any]],
    place: Callable[[str, Tensor, str], int] | None,
) -> int:
    of_mode = [k for k, group in enumerate(groups) if group["mode"] == mode]
    if place is None:
        if len(of_mode) == 1:
            return of_mode[0]
        raise ValueError(
            f"place must say which group takes {name!r} where not just one has mode={mode!r}, got "
            f"None, and {len(of_mode)} groups have it"
        )
    chosen = place(name, p, mode)
    if chosen not in of_mode:
        raise ValueError(
            f"place must give the position of a group with mode={mode!r}, one of {of_mode}, got "
            f"{chosen!r} for {name!r}"
        )
    return chosen
