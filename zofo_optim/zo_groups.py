"""Zeroth-order parameter groups as a step works on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zofo_kernels import NOISE_VERSION, Direction, Weights

from .active import Active
from .sharding import Placed


class Noise(NamedTuple):
    """What all directions of an optimizer have in common; see :class:`zofo_kernels.Direction`."""

    distribution: str = "gaussian"
    version: int = NOISE_VERSION
    rank: int = 0


_NOISE = Noise()
_KEPT_PARTS = 64


@dataclass
class ZOGroup:
    """A zeroth-order parameter group, ready for one step.

    ``placed`` are its parameters, with their places among all zeroth-order parameters, which
    select their noise; ``options`` is the optimizer's own dictionary. Where some of them move,
    ``placed`` are these, and ``active`` their positions among all.
    """

    placed: Placed
    options: dict[str, Any]
    noise: Noise = _NOISE
    active: tuple[int, ...] | None = None
    scale: float = 1.0
    """Of slopes, see :class:`zofo_optim.active.Chosen`."""

    @property
    def weights(self) -> Weights:
        """What this process holds of them."""
        return self.placed.weights

    @property
    def params(self) -> list[Tensor]:
        """As the user gave them; sharded ones are DTensors."""
        return self.placed.params

    @property
    def indices(self) -> list[int]:
        return self.placed.indices

    @property
    def names(self) -> list[str]:
        """Names for messages, one a parameter; numbered where the user gave none."""
        given = self.options.get("param_names")
        if given is None:
            return [
                f"parameter {i} {tuple(p.shape)}"
                for i, p in zip(self.indices, self.params, strict=True)
            ]
        named = {id(p): name for p, name in zip(self.options["params"], given, strict=True)}
        return [named[id(p)] for p in self.params]

    @property
    def mu(self) -> float:
        """In units of ``unit``, as slopes are."""
        return float(self.options["mu"])

    @property
    def unit(self) -> float:
        """What ``mu`` and ``lr`` count in: weights are ``unit`` theta, and theta moves by mu v."""
        return float(self.options.get("unit", 1.0))

    @property
    def displacement(self) -> float:
        """How far weights move along v."""
        return self.mu * self.unit

    def direction(self, sample: int) -> Direction:
        """Direction ``sample`` of the group's present step."""
        return Direction(self.options["seed"], self.options["zo_step"], sample, *self.noise)


class Tables:
    """The groups' parameters as :class:`Placed`, kept from step to step with their addresses."""

    def __init__(self, noise: Noise) -> None:
        self._noise = noise
        self._kept: list[Placed] = []
        self._parts: dict[int, tuple[Placed, dict[tuple[int, ...], Placed]]] = {}

    def groups(self, param_groups: Iterable[dict[str, Any]]) -> list[ZOGroup]:
        """The zeroth-order ones with their noise indices; a parameter counts once in a group."""
        found: list[ZOGroup] = []
        index = 0
        for options in param_groups:
            if options.get("mode") == "zo":
                params = list(dict.fromkeys(options["params"]))
                placed = self._placed(len(found), params, index)
                found.append(ZOGroup(placed, options, self._noise))
                index += len(params)
        return found

    def _placed(self, position: int, params: list[Tensor], index: int) -> Placed:
        """Of the group at ``position``, whose first parameter has noise index ``index``."""
        indices = list(range(index, index + len(params)))
        if position < len(self._kept):
            kept = self._kept[position]
            if kept.indices == indices and is_same(kept.params, params) and kept.is_current():
                return kept
        self._kept[position : position + 1] = [Placed(params, indices)]
        return self._kept[position]

    def active(self, groups: Sequence[ZOGroup], activity: Active | None) -> list[ZOGroup]:
        """The groups as they move in their present step.

        Raises:
            ValueError: nothing of any group moves.
        """
        if activity is None:
            return list(groups)
        found = []
        for position, group in enumerate(groups):
            step = group.options["zo_step"] if activity.changes else 0
            seed = group.options["seed"]
            positions, scale = activity.choose(group.names, seed, step, position)
            part = self._part(position, group.placed, positions)
            found.append(replace(group, placed=part, active=positions, scale=scale))
        if groups and not any(group.params for group in found):
            raise ValueError(
                f"active must leave each step a zeroth-order parameter, got {activity}, by which "
                "none moves in this one"
            )
        return found

    def ever_active(self, groups: Sequence[ZOGroup], activity: Active | None) -> list[ZOGroup]:
        """The groups, with all parameters that some step moves."""
        if activity is None:
            return list(groups)
        return [
            replace(group, placed=self._part(position, group.placed, activity.ever(group.names)))
            for position, group in enumerate(groups)
        ]

    def _part(self, position: int, whole: Placed, chosen: tuple[int, ...]) -> Placed:
        """Of a group's weights; the last few are kept, as cycles come back to them."""
        of, parts = self._parts.get(position, (None, {}))
        if of is not whole:
            parts = {}
            self._parts[position] = whole, parts
        if chosen not in parts:
            if len(parts) >= _KEPT_PARTS:
                del parts[next(iter(parts))]
            params = [whole.params[i] for i in chosen]
            parts[chosen] = Placed(params, [whole.indices[i] for i in chosen])
        return parts[chosen]


def has_16_bits(dtype: torch.dtype) -> bool:
    """Whether rounding depends on the noise version."""
    return dtype in (torch.bfloat16, torch.float16)


def is_same(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether two lists hold the same objects, in order."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
