"""Adding up a trace: FLOPs and bytes, and the sets of tensors for which they are due.

A set of tensors is an int (:mod:`.sets`). An amount is due as soon as one tensor of its set trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .derivatives import Derivatives, inputs_of
from .recorded import Op, Trace
from .sets import union


class Kept(NamedTuple):
    """Memory that a forward keeps for the backward."""

    nbytes: int
    """Negative for what another term counts too much."""
    masks: frozenset[int]
    """It is kept where one of these sets is met: one a gradient that needs it."""


class Counted(NamedTuple):
    """Of one trace, by its own bits."""

    flops: dict[int, int]
    """By set."""
    kept: list[Kept]


def count(recorded: Trace) -> Counted:
    """FLOPs of the loss's backward, and what its forward keeps.

    Parameters, buffers and inputs are there anyway and do not count.
    """
    ask = Derivatives(recorded)
    flops: dict[int, int] = {}
    kept: dict[int, set[int]] = {}  # by storage; what is no tensor's has numbers past them
    sizes = {k: storage.nbytes for k, storage in enumerate(recorded.storages)}
    others: list[Kept] = []  # what some gradients need, and others do not: terms of either sign

    def there(number: int) -> bool:
        return number < len(recorded.storages) and recorded.storages[number].outside

    for op in recorded.ops:
        if op.node not in recorded.reached:
            continue
        derivative = ask.of(op)
        if derivative is None:
            found = list(_as_seen(recorded, op))
        else:
            inputs = inputs_of(op)
            masks = {place: op.masks[n] for place, n in enumerate(inputs) if n in op.masks}
            for places, amount in derivative.flops:
                mask = union(masks[p] for p in places)
                flops[mask] = flops.get(mask, 0) + amount
            found = []
            for kind, which, terms in derivative.kept:
                if kind == "more":
                    number = len(sizes)
                    sizes[number] = which
                else:
                    value = inputs[which] if kind == "input" else op.outputs[which]
                    number = recorded.values[value or 0].storage
                sets = [(union(masks[p] for p in places), times) for places, times in terms]
                if len(sets) == 1 and sets[0][1] == 1:
                    found.append((number, sets[0][0]))
                elif not there(number):
                    others += [Kept(n * sizes[number], frozenset([mask])) for mask, n in sets]
        for number, mask in found:
            if not there(number):
                kept.setdefault(number, set()).add(mask)
    once = [Kept(sizes[number], frozenset(masks)) for number, masks in kept.items()]
    return Counted(flops, once + others)


def _as_seen(recorded: Trace, op: Op) -> Iterator[tuple[int, int]]:
    """What autograd saved when the closure ran, as if for every gradient."""
    for number in recorded.saved.get(op.node, ()):
        yield number, union(op.masks.values())
