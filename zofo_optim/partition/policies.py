"""Policies: which tensors train first-order, where not all can."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..costs import Costs
from ..names import layer_of
from .knapsack import BINS, Item, best_set


def filled(
    names: Sequence[str],
    parts: Iterable[Collection[str]],
    chosen: Collection[str],
    fits: Callable[[Collection[str]], bool],
    *,
    stop: bool,
) -> list[str]:
    """Those chosen, and in turn each part that still fits; to stop, none after one that fails.

    In the order of ``names``.
    """
    found = set(chosen)
    for part in parts:
        if found.issuperset(part):
            continue
        if fits(found | set(part)):
            found |= set(part)
        elif stop:
            break
    return [name for name in names if name in found]


@dataclass(frozen=True)
class Problem:
    """What a policy chooses by."""

    costs: Costs
    of: str
    """What is limited: "flops" of the backward, or "memory", the bytes beyond inference."""
    limit: int
    in_backward: bool
    """Whether gradients are applied and freed one by one, so that only the largest is stored."""
    importance: Mapping[str, float]
    gradient_norm: Mapping[str, float]
    adapters: Collection[str]
    """Names of tensors that adapters added."""
    seed: int
    bins: int = BINS
    coupling: bool = False
    """Whether a second backward adds to gradients that are held."""

    @property
    def names(self) -> list[str]:
        """In order of depth, nearest the loss first."""
        return [tensor.name for tensor in self.costs.tensors]

    def spent(self, chosen: Collection[str]) -> int:
        """What a set costs, exactly, in the unit of the limit."""
        if self.of == "flops":
            return self.costs.flops(chosen)
        return self.costs.bytes(chosen, in_backward=self.in_backward)

    def fits(self, chosen: Collection[str]) -> bool:
        return self.spent(chosen) <= self.limit

    def filled(
        self, parts: Iterable[Collection[str]], chosen: Collection[str] = (), *, stop: bool = False
    ) -> list[str]:
        """See :func:`filled`, within the limit."""
        return filled(self.names, parts, chosen, self.fits, stop=stop)

    def best(self, values: Mapping[str, float]) -> list[str]:
        """The set of most value by the dynamic programme, and what else fits, by value.

        The programme adds up costs that are upper bounds; what they leave is then filled. A
        tensor's share may be below 0, where it saves what is counted for another: then it is 0.
        """
        tensors = self.costs.tensors
        if self.of == "flops":
            items = [
                Item(values[t.name], max(0, t.weight_flops), max(0, t.path_flops)) for t in tensors
            ]
            found = best_set(items, self.limit, self.bins)
        else:
            sizes = sorted({t.gradient_bytes for t in tensors}) if self.in_backward else [0]
            sets = [self._best_of_memory(values, size) for size in sizes]
            found = max(sets, key=lambda s: (sum(values[tensors[i].name] for i in s), -len(s)))
        rest = _by_value(self, values)
        return self.filled([[name] for name in rest], [tensors[i].name for i in found])

    def _best_of_memory(self, values: Mapping[str, float], largest: int) -> frozenset[int]:
        """With ``in_backward``, of the tensors whose gradients are no larger: one is stored."""
        items = [
            Item(
                values[t.name] if not self.in_backward or t.gradient_bytes <= largest else 0.0,
                max(0, t.own_bytes) + t.state_bytes + t.gradient_bytes * (not self.in_backward),
                max(0, t.path_bytes),
                t.input,
                0 if t.input is None else t.input_bytes,
            )
            for t in self.costs.tensors
        ]
        return best_set(items, self.limit - (largest if self.in_backward else 0), self.bins)


class Policy(NamedTuple):
    """How a set is chosen, and what must be known for it."""

    choose: Callable[[Problem], list[str]]
    """Names, in order of depth."""
    needs_profile: bool
    """Whether importances or gradients are needed, so a backward of real batches."""
    begins: Callable[[Problem], Sequence[Collection[str]]]
    """The least sets that it may choose."""
    order: Callable[[Problem], tuple[Sequence[Collection[str]], bool]]
    """Parts in the order in which they fill what is left; whether none follows one that fails."""
    values: Callable[[Problem], Mapping[str, float]]
    """By which one of two sets is preferred."""


def _by_value(problem: Problem, values: Mapping[str, float]) -> list[str]:
    """The most valuable first; none whose step would raise the loss."""
    return sorted((n for n in problem.names if values[n] >= 0), key=lambda name: -values[name])


def _in_turn(
    parts: Callable[[Problem], Sequence[Collection[str]]],
    values: Callable[[Problem], Mapping[str, float]],
    *,
    needs_profile: bool = False,
    stop: bool = False,
    begins: Callable[[Problem], Sequence[Collection[str]]] | None = None,
) -> Policy:
    """A policy that takes parts in turn while they fit."""
    return Policy(
        lambda problem: problem.filled(parts(problem), stop=stop),
        needs_profile,
        begins or (lambda problem: parts(problem)[:1]),
        lambda problem: (parts(problem), stop),
        values,
    )


def _of_most(values: Callable[[Problem], Mapping[str, float]]) -> Policy:
    """The policy of the dynamic programme."""
    return Policy(
        lambda problem: problem.best(values(problem)),
        True,
        _valued(values),
        lambda problem: ([[name] for name in _by_value(problem, values(problem))], False),
        values,
    )


def _valued(
    values: Callable[[Problem], Mapping[str, float]],
) -> Callable[[Problem], list[list[str]]]:
    return lambda problem: [[n] for n in problem.names if values(problem)[n] > 0]


def _importances(problem: Problem) -> Mapping[str, float]:
    return problem.importance


def _norms(problem: Problem) -> Mapping[str, float]:
    return problem.gradient_norm


def _alike(problem: Problem) -> Mapping[str, float]:
    return dict.fromkeys(problem.names, 1.0)


def _any(problem: Problem) -> list[list[str]]:
    return [[name] for name in problem.names]


def _most_important(problem: Problem) -> list[list[str]]:
    return [[name] for name in _by_value(problem, problem.importance)]


def _drawn(problem: Problem) -> list[list[str]]:
    names = problem.names
    random.Random(problem.seed).shuffle(names)
    return [[name] for name in names]


def _adapter_layers(problem: Problem) -> list[list[str]]:
    """The adapters' tensors by the layer that they are in, from the loss down."""
    layers: dict[str, list[str]] = {}
    for name in problem.names:
        if name in problem.adapters:
            layers.setdefault(layer_of(name), []).append(name)
    if not layers:
        raise ValueError(
            "policy must be another than 'adapters' where no candidate is an adapter's, got "
            "'adapters'; wrap the model by peft.get_peft_model before"
        )
    return list(layers.values())


POLICIES: Mapping[str, Policy] = {
    "importance": _of_most(_importances),
    "top_k": _in_turn(
        _most_important, _importances, needs_profile=True, begins=_valued(_importances)
    ),
    "gradient_norm": _of_most(_norms),
    "last_layers": _in_turn(_any, _alike, stop=True),
    "random": _in_turn(_drawn, _alike, begins=_any),
    "adapters": _in_turn(_adapter_layers, _alike, stop=True),
}
"""By name: what ``policy=`` of :func:`importance_partition` may be."""
