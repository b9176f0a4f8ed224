"""Where the tensors of a partition are: in a model, and in an optimizer's groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

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
    _check_shapes("model", {row: known[where[row.name]] for row in partition.rows})
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


class Moved(NamedTuple):
    """What :meth:`Partition.apply` makes of an optimizer's groups."""

    members: list[Members]
    frozen: list[Tensor]
    """Of what is in groups, and of the model."""
    rows: dict[int, Row]
    """By identity of the parameters."""


def moved(
    partition: Partition,
    optimizer: GroupsAndState,
    model: nn.Module | None,
    place: Callable[[str, Tensor, str], int] | None,
) -> Moved:
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
    inside: dict[int, tuple[int, str, Tensor]] = {}
    for position, group in enumerate(groups):
        named = zip(group.get("param_names", ()), group["params"], strict=True)
        inside |= {id(p): (position, name, p) for name, p in named}
    if model is None:
        every = {key: (name, p) for key, (_, name, p) in inside.items()}
        rows = _rows_inside(partition, dict(every.values()))
    else:
        every = {id(p): (names[0], p) for names, p in parameters_with_all_names(model)}
        rows = rows_of(partition, model)
        if foreign := [name for key, (_, name, _) in inside.items() if key not in every]:
            raise ValueError(
                "model must be the one whose tensors optimizer has, got one that lacks "
                f"{_some(foreign)}"
            )
    lost = [name for k, (at, name, _) in inside.items() if k not in rows if is_fo(groups[at])]
    if lost:
        raise ValueError(
            "optimizer must have first-order tensors that the partition knows, got one that has "
            f"{_some(lost)} beside"
        )
    found: list[dict[str, Tensor]] = [{} for _ in groups]
    for key, (first, p) in every.items():
        at, name, _ = inside.get(key, (-1, first, p))
        row = rows.get(key)
        mode = None if row is None else row.mode
        if mode == "frozen":  # what trained is saved with what trains
            mode = "fo" if at >= 0 else None
        if mode is not None and (at < 0 or groups[at]["mode"] != mode):
            at = _group_for(name, p, mode, groups, place)
        if at >= 0:
            found[at][name] = p
    frozen = [p for key, (_, p) in every.items() if key in rows and rows[key].mode == "frozen"]
    return Moved([list(in_order(partition, one).items()) for one in found], frozen, rows)


def is_fo(group: Mapping[str, Any]) -> bool:
    return bool(group["mode"] == "fo")


def _rows_inside(partition: Partition, known: Mapping[str, Tensor]) -> dict[int, Row]:
    """The rows of what is in groups; of others they may be frozen only.

    Raises:
        ValueError: one trains, or has another shape.
    """
    where = match_names([row.name for row in partition.rows], known)
    for row in partition.rows:
        if row.name not in where and row.mode != "frozen":
            raise ValueError(
                "model must be given where a tensor trains that is in no group of the optimizer, "
                f"got None, and {row.name!r} is one"
            )
    found = {row: known[where[row.name]] for row in partition.rows if row.name in where}
    _check_shapes("optimizer", found)
    return {id(p): row for row, p in found.items()}


def _check_shapes(what: str, tensors: Mapping[Row, Tensor]) -> None:
    for row, p in tensors.items():
        if tuple(p.shape) != row.shape:
            raise ValueError(
                f"{what} must have tensors of the partition's shapes, got {tuple(p.shape)} for "
                f"{row.name!r}, which has {row.shape}"
            )


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
