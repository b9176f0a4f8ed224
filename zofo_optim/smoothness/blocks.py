"""What smoothness is measured of: sets of parameters, each with a diagonal block of the Hessian."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zofo_kernels._torch_compat import is_wrapper_subclass

from ..buffers import Buffers, ParamGroups
from ..groups_and_state import GroupsAndState
from ..names import layer_of

BY = ("mode", "group", "layer", "tensor")


@dataclass(frozen=True)
class Block:
    """Parameters by name, which are moved together."""

    name: str
    tensors: Mapping[str, Tensor]

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.tensors.values())

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.tensors.values())


def blocks_of(target: Any, by: str, model: nn.Module | None = None) -> tuple[list[Block], Buffers]:
    """The blocks of a target, and the buffers that evaluations may change.

    Args:
        target: an optimizer, parameter groups, a module, or tensors by the name of their block.
        by: one of :data:`BY`.
        model: whose buffers they are; None: the target's, where it knows a model.

    Raises:
        TypeError: ``target`` is none of these, or a parameter is no leaf tensor of real numbers
            in memory.
        ValueError: ``by`` is unknown, does not fit, or there is nothing to measure.
    """
    if by not in BY:
        raise ValueError(f"by must be one of {BY}, got {by!r}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(target, Mapping) and "params" in target:
        target = [target]  # a group alone
    if isinstance(target, Mapping):
        if by != "mode":
            raise ValueError(f"by must be left out where target names its own blocks, got {by!r}")
        if len(names := {str(name) for name in target}) < len(target):
            raise ValueError(f"target must name its blocks differently, got {sorted(names)}")
        blocks = [
            Block(str(name), _once(_named(value, str(name)))) for name, value in target.items()
        ]
        buffers = Buffers()
    else:
        entries, buffers = _entries(target)
        blocks = _split(entries, by)
    for block in blocks:
        for name, p in block.tensors.items():
            _check(name, p)
    blocks = [block for block in blocks if block.size]
    if not blocks:
        raise ValueError("target must hold a parameter of floating point, got none")
    return blocks, buffers if model is None else Buffers(model)


@dataclass(frozen=True)
class _Entry:
    group: int
    mode: str
    name: str
    tensor: Tensor


def _entries(target: Any) -> tuple[list[_Entry], Buffers]:
    """Each parameter once."""
    if isinstance(target, nn.Module):
        of_module = (
            _Entry(int(p.requires_grad), "fo" if p.requires_grad else "zo", name, p)
            for name, p in target.named_parameters()
            if p.is_floating_point()
        )
        return list(of_module), Buffers(target)
    groups = target.param_groups if isinstance(target, torch.optim.Optimizer) else target
    if not isinstance(groups, Sequence) or not all(isinstance(g, Mapping) for g in groups):
        raise TypeError(
            "target must be an optimizer, a list of parameter groups, a torch.nn.Module or a "
            f"mapping of names to tensors or modules, got {target!r:.80}"
        )
    if isinstance(target, GroupsAndState):
        buffers = target.buffers
    else:
        buffers = Buffers(target.model if isinstance(target, ParamGroups) else None)
    found: dict[int, _Entry] = {}
    for position, group in enumerate(groups):
        params = list(_tensors(group["params"]))
        names = group.get("param_names")
        for number, p in enumerate(params):
            own = names[number] if names else _own_name(group["params"], number)
            name = own or f"group {position}, parameter {number}"
            found.setdefault(id(p), _Entry(position, str(group.get("mode", "fo")), name, p))
    return list(found.values()), buffers


def _tensors(params: Any) -> Iterator[Tensor]:
    """Of a group as a user writes it: a tensor, tensors, or pairs of name and tensor."""
    if isinstance(params, Tensor):
        params = [params]
    for item in params:
        yield item[1] if isinstance(item, tuple) else item


def _own_name(params: Any, number: int) -> str | None:
    item = params[number] if isinstance(params, Sequence) else None
    return str(item[0]) if isinstance(item, tuple) else None


def _named(value: Any, name: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, nn.Module):
        return list(value.named_parameters())
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(
            f"target must map names to tensors, got {type(value).__name__} for {name!r}"
        )
    return [(f"{name} {number}", p) for number, p in enumerate(value)]


def _once(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Each tensor once; names that come again are numbered."""
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, p in named:
        if id(p) not in known:
            known.add(id(p))
            free, number = name, 1
            while free in found:
                number += 1
                free = f"{name} ({number})"
            found[free] = p
    return found


def _split(entries: Iterable[_Entry], by: str) -> list[Block]:
    every = list(entries)
    if by == "tensor":
        named = _once((entry.name, entry.tensor) for entry in every)
        return [Block(name, {name: p}) for name, p in named.items()]
    blocks: dict[str, list[tuple[str, Tensor]]] = {}
    for entry in every:
        name = {
            "mode": entry.mode,
            "group": f"group {entry.group} ({entry.mode})",
            "layer": f"{entry.mode}, {layer_of(entry.name) or entry.name}",
        }[by]
        blocks.setdefault(name, []).append((entry.name, entry.tensor))
    return [Block(name, _once(named)) for name, named in blocks.items()]


def _check(name: str, p: Any) -> None:
    if not isinstance(p, Tensor) or not p.is_leaf or not p.is_floating_point():
        kind = f"{p.dtype}, with a graph" if isinstance(p, Tensor) else type(p).__name__
        raise TypeError(f"target must hold leaf tensors of real numbers, got {name!r}, of {kind}")
    if is_wrapper_subclass(p):
        raise TypeError(
            "target must hold plain weights, which can be moved along any direction, got "
            f"{type(p).__name__} (sharded or quantised) in {name!r}; measure on one process"
        )
    if p.device.type == "meta":
        raise ValueError(f"target must hold weights in memory, got {name!r} on the meta device")
