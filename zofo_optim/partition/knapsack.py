"""The dynamic programme that picks the tensors of most value within a budget.

As GreenTrainer's (Huang et al. 2024), which Hi-ZFO (Jin, Tan, ACL Findings 2026) takes over:
tensors in order of depth, nearest the loss first; a set costs what its tensors cost by themselves,
and what it costs to pass the error down to its lowest one. Here tensors may also share an input,
which is kept once for all of them.

GreenTrainer rounds every cost to 1,000 bins. Rounding up, hundreds of small tensors fill a budget
that they hardly need; rounding down, the budget is exceeded. Here costs stay exact: a state of the
programme is a set's cost and its value, and only where there are more states than bins are the
best of each bin kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

BINS = 1000
"""As GreenTrainer's."""


class Item(NamedTuple):
    """A tensor as the programme sees it; costs are in one unit, FLOPs or bytes."""

    value: float
    cost: int
    """Of the tensor by itself."""
    path: int = 0
    """Of passing the error on to it, from the item before it."""
    input: int | None = None
    """Which input it needs, that others may need too."""
    input_cost: int = 0
    """Of this input, paid once."""


def cost_of(items: Sequence[Item], chosen: Iterable[int]) -> int:
    """What a set costs; 0 for none."""
    taken = set(chosen)
    if not taken:
        return 0
    inputs = {items[i].input: items[i].input_cost for i in taken if items[i].input is not None}
    own = sum(items[i].cost + items[i].input_cost * (items[i].input is None) for i in taken)
    return own + sum(inputs.values()) + sum(item.path for item in items[: max(taken) + 1])


def best_set(items: Sequence[Item], budget: int, bins: int = BINS) -> frozenset[int]:
    """The set of the largest total value whose cost is within ``budget``.

    Optimal where the sets in question have at most ``bins`` costs, as where costs are small
    integers; else nearly so. The budget is never exceeded.

    Args:
        items: in order of depth, nearest the loss first.
        budget: in the unit of their costs.
        bins: states that are kept; more take longer.

    Returns:
        Positions of the items; empty where none fits, or none has a value above 0.

    Raises:
        ValueError: a cost is below 0, a value is not finite, items disagree about the cost of an
            input, or ``bins`` is below 1.
    """
    _check(items, bins)
    best, last = 0.0, -1
    path = 0
    closed = _States(budget, bins)  # inputs that no later item needs
    opened: dict[Any, list[int]] = {}
    ends = {_key(i, item): i for i, item in enumerate(items)}
    for i, item in enumerate(items):
        path += item.path
        opened.setdefault(_key(i, item), []).append(i)
        states = closed
        for key, members in list(opened.items()):
            states = states.with_items(items, members)
            if ends[key] == i:
                closed = closed.with_items(items, members)
                del opened[key]
        found = states.best(budget - path)
        if found > best:
            best, last = found, i
    if last < 0:
        return frozenset()
    states = _States(budget, bins)
    together: dict[Any, list[int]] = {}
    for i, item in enumerate(items[: last + 1]):
        together.setdefault(_key(i, item), []).append(i)
    for members in together.values():
        states = states.with_items(items, members)
    return states.best_set(budget - sum(item.path for item in items[: last + 1]))


def _key(position: int, item: Item) -> Any:
    """Items of one key share an input."""
    return ("alone", position) if item.input is None else item.input


def _check(items: Sequence[Item], bins: int) -> None:
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
        raise ValueError(f"bins must be an int >= 1, got {bins!r}")
    inputs: dict[int, int] = {}
    for item in items:
        if min(item.cost, item.path, item.input_cost) < 0:
            raise ValueError(f"items must have costs >= 0, got {item}")
        if not np.isfinite(item.value):
            raise ValueError(f"items must have finite values, got {item}")
        if item.input is not None:
            if inputs.setdefault(item.input, item.input_cost) != item.input_cost:
                raise ValueError(f"items must agree about the cost of an input, got {item}")


class _States:
    """Sets that may be part of the best one: none costs as much as another and is worth less.

    Args:
        budget: sets of higher cost are dropped.
        bins: how many sets are kept.
    """

    def __init__(self, budget: int, bins: int) -> None:
        self._budget = budget
        self._bins = bins
        self._costs = np.zeros(1 if budget >= 0 else 0, dtype=np.int64)
        self._values = np.zeros(len(self._costs))
        self._before: _States | None = None
        self._parents = np.zeros(0, dtype=np.int64)  # position among the states before
        self._taken: tuple[int | None, ...] = ()
        self._which = np.zeros(0, dtype=np.int8)  # of these, for each state

    def with_items(self, items: Sequence[Item], members: Sequence[int]) -> _States:
        """These sets, and with them any of the items, which share one input."""
        free = [i for i in members if items[i].value > 0]
        if not free:
            return self
        states = self._joined(items[free[0]].input_cost, None)
        for i in free:  # states with the input paid alone; those without come back at the end
            states = states._joined(items[i].cost, i, items[i].value, keep=True)
        return states._merged(self)

    def _joined(
        self, cost: int, item: int | None, value: float = 0.0, keep: bool = False
    ) -> _States:
        """Every set with the item added; and, to keep, without it."""
        costs, values = self._costs + cost, self._values + value
        parents = np.arange(len(costs))
        which = np.zeros(len(costs), dtype=np.int8)
        if keep:
            costs = np.concatenate([self._costs, costs])
            values = np.concatenate([self._values, values])
            parents = np.concatenate([parents, parents])
            which = np.concatenate([which + 1, which])
        return self._made(costs, values, parents, which, (item, None))

    def _merged(self, older: _States) -> _States:
        """These sets and those of ``older``, from which these were made."""
        costs = np.concatenate([older._costs, self._costs])
        values = np.concatenate([older._values, self._values])
        parents = np.concatenate([np.arange(len(older._costs)), np.arange(len(self._costs))])
        which = np.repeat(np.array([0, 1], dtype=np.int8), [len(older._costs), len(self._costs)])
        made = self._made(costs, values, parents, which, (None, None))
        made._older = older
        return made

    _older: _States | None = None
    """Where set: states whose ``which`` is 0 are among these, not among the ones before."""

    def _made(self, costs: Any, values: Any, parents: Any, which: Any, taken: Any) -> _States:
        order = np.lexsort((-values, costs))
        order = order[costs[order] <= self._budget]
        sorted_values = values[order]
        above = np.concatenate([[-np.inf], np.maximum.accumulate(sorted_values)[:-1]])
        order = order[sorted_values > above]
        if len(order) > self._bins:
            bin_of = costs[order] * self._bins // (self._budget + 1)
            order = order[np.append(bin_of[1:] != bin_of[:-1], True)]  # the last is worth most
        made = _States(self._budget, self._bins)
        made._costs, made._values = costs[order], values[order]
        made._parents, made._which = parents[order], which[order]
        made._before, made._taken = self, taken
        return made

    def best(self, budget: int) -> float:
        """The largest value within the budget; 0 where there is none."""
        count = int(np.searchsorted(self._costs, budget, side="right"))
        return float(self._values[count - 1]) if count else 0.0

    def best_set(self, budget: int) -> frozenset[int]:
        """The items of the set of this value."""
        position = int(np.searchsorted(self._costs, budget, side="right")) - 1
        found: set[int] = set()
        states: _States | None = self
        while states is not None and states._before is not None and position >= 0:
            which, parent = int(states._which[position]), int(states._parents[position])
            if states._taken[which] is not None:
                found.add(states._taken[which])  # type: ignore[arg-type]
            older = states._older if which == 0 else None
            states, position = states._before if older is None else older, parent
        return frozenset(found)
