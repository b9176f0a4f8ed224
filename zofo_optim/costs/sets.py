"""Sets of tensors as ints, one bit a tensor, and amounts that are due for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping


def union(masks: Iterable[int]) -> int:
    """Of sets."""
    whole = 0
    for mask in masks:
        whole |= mask
    return whole


def members(mask: int) -> Iterator[int]:
    """Places of the bits that are set, from the lowest up."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def summed(terms: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Amounts by set: those of equal sets in one."""
    found: dict[int, int] = {}
    for mask, amount in terms:
        found[mask] = found.get(mask, 0) + amount
    return found


def due(terms: Mapping[int, int], chosen: int, tensors: int) -> int:
    """The sum of the amounts whose sets meet the chosen one.

    Args:
        terms: amounts by set; the bit past the tensors' stands for what is due with any choice.
        chosen: set of tensors; the empty one costs nothing.
        tensors: how many there are.
    """
    if not chosen:
        return 0
    chosen |= 1 << tensors
    return sum(amount for mask, amount in terms.items() if mask & chosen)
