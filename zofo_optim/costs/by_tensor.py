"""Shares of a backward's costs by tensor, as a dynamic programme over the depth adds them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .counting import Kept
from .sets import members, union


class Share(NamedTuple):
    """Of one amount: due for one tensor, and due for it and all that lie deeper."""

    own: list[int]
    path: list[int]


class Inputs(NamedTuple):
    """Of kept activations that several tensors' own gradients need."""

    nbytes: list[int]
    numbers: list[int | None]


def split(terms: Mapping[int, int], tensors: int) -> Share:
    """Shares of terms by depth.

    A term of one tensor is its own. One of several is on the path: the tensor nearest the loss
    has it, so that every choice which meets the term, and reaches as deep, pays it. Negative terms
    of several are left out: some choice that pays for them may not meet them.

    Args:
        terms: amounts by set; bits from ``tensors`` on stand for what is always due.
        tensors: how many there are.
    """
    share = Share([0] * tensors, [0] * tensors)
    for mask, amount in terms.items():
        depths = list(members(mask))
        if len(depths) == 1 and depths[0] < tensors:
            share.own[depths[0]] += amount
        else:
            if amount < 0:
                continue
            first = 0 if depths[-1] >= tensors else depths[0]
            share.path[first] += amount
    return share


def shared_inputs(kept: Sequence[Kept], tensors: int) -> tuple[Inputs, list[Kept]]:
    """Activations for the gradients of a few neighbours, such as the input of q, k and v.

    A tensor has one at most; neighbours do not interleave with others.

    Returns:
        These, by depth, and what is left.
    """
    groups: dict[int, int] = {}
    rest = []
    for item in kept:
        mask = union(item.masks) if all(m.bit_count() == 1 for m in item.masks) else 0
        if mask.bit_count() > 1 and mask.bit_length() <= tensors:
            groups[mask] = groups.get(mask, 0) + item.nbytes
        else:
            rest.append(item)
    inputs = Inputs([0] * tensors, [None] * tensors)
    taken: set[int] = set()
    for mask, nbytes in sorted(groups.items(), key=lambda group: -group[1]):
        depths = list(members(mask))
        span = range(depths[0], depths[-1] + 1)
        if not taken.isdisjoint(span):
            rest.append(Kept(nbytes, frozenset([mask])))
            continue
        taken.update(span)
        for k in depths:
            inputs.nbytes[k], inputs.numbers[k] = nbytes, depths[0]
    return inputs, rest
