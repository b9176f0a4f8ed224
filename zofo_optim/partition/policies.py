"""Policies: which tensors train first-order, where not all can."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..costs import Costs
from .knapsack import BINS, Item, best_set


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
        """Those chosen, and in turn each part that still fits; to stop, none after one that fails.

        In order of depth.
        """
        found = set(chosen)
        for part in parts:
            if self.fits(found | set(part)):
                found |= set(part)
            elif stop:
                break
        return [name for name in self.names if name in found]

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


def _importance(problem: Problem) -> list[str]:
    return problem.best(problem.importance)


def _gradient_norm(problem: Problem) -> list[str]:
    return problem.best(problem.gradient_norm)


def _top_k(problem: Problem) -> list[str]:
    return problem.filled([[name] for name in _by_value(problem, problem.importance)])


def _by_value(problem: Problem, values: Mapping[str, float]) -> list[str]:
    """The most valuable first; none whose step would raise the loss."""
    return sorted((n for n in problem.names if values[n] >= 0), key=lambda name: -values[name])


def _last_layers(problem: Problem) -> list[str]:
    return problem.filled([[name] for name in problem.names], stop=True)


def _random(problem: Problem) -> list[str]:
    names = problem.names
    random.Random(problem.seed).shuffle(names)
    return problem.filled([[name] for name in names])


def _adapters(problem: Problem) -> list[str]:
    return problem.filled(_adapter_layers(problem), stop=True)


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


def layer_of(name: str) -> str:
    """The part of a tensor's name that tells its layer: up to the first number, or its module."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return found[0] if found else name.rpartition(".")[0]


def _any(problem: Problem) -> list[list[str]]:
    return [[name] for name in problem.names]


def _valued(
    values: Callable[[Problem], Mapping[str, float]],
) -> Callable[[Problem], list[list[str]]]:
    return lambda problem: [[n] for n in problem.names if values(problem)[n] > 0]


_BY_IMPORTANCE = _valued(lambda problem: problem.importance)
_BY_NORM = _valued(lambda problem: problem.gradient_norm)

POLICIES: Mapping[str, Policy] = {
    "importance": Policy(_importance, True, _BY_IMPORTANCE),
    "top_k": Policy(_top_k, True, _BY_IMPORTANCE),
    "gradient_norm": Policy(_gradient_norm, True, _BY_NORM),
    "last_layers": Policy(_last_layers, False, lambda problem: _any(problem)[:1]),
    "random": Policy(_random, False, _any),
    "adapters": Policy(_adapters, False, lambda problem: _adapter_layers(problem)[:1]),
}
"""By name: what ``policy=`` of :func:`importance_partition` may be."""
