"""Which factors of low-rank directions a pass needs, and where they are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .region import Region
from .structure import STREAM_LEFT, STREAM_RIGHT


class Rows(NamedTuple):
    """The rows of a parameter's U that are needed, and of its V: [first, end) and [low, high)."""

    first: int
    end: int
    low: int
    high: int

    @classmethod
    def of(cls, region: Region) -> Rows | None:
        """Those of a region; None where its noise is full."""
        if region.matrix is None:
            return None
        rows, columns = region.matrix
        _, size, offset = region.runs()[-1]
        first, last = region.offset // columns, (offset + size - 1) // columns
        return cls(first, last + 1, first // rows * columns, (last // rows + 1) * columns)

    def __or__(self, other: Rows) -> Rows:
        return Rows(
            min(self.first, other.first),
            max(self.end, other.end),
            min(self.low, other.low),
            max(self.high, other.high),
        )

    def units(self) -> int:
        return self.end - self.first + self.high - self.low


class Block(NamedTuple):
    """How the factors of a direction lie in memory, for one k; those for the next k follow."""

    places: dict[int, tuple[int, int]]
    """For each parameter, where row 0 of its U and of its V would be."""
    jobs: list[tuple[int, int, int, int, int]]
    """What is made: fields of :class:`FactorJob`, and where it begins."""
    units: int
    """Size of the block."""

    @classmethod
    def of(cls, regions: Sequence[Region], multiple: int = 1) -> Block:
        """For all regions, each factor once; all of them begin at multiples of ``multiple``."""
        needed: dict[int, Rows] = {}
        for region in regions:
            rows = Rows.of(region)
            if rows is not None:
                known = needed.get(region.parameter)
                needed[region.parameter] = rows if known is None else known | rows
        places, jobs, at = {}, [], 0
        for parameter, (first, end, low, high) in needed.items():
            then = at + _up(end - first, multiple)
            jobs += [
                (parameter, STREAM_LEFT, first, end - first, at),
                (parameter, STREAM_RIGHT, low, high - low, then),
            ]
            places[parameter] = at - first, then - low
            at = then + _up(high - low, multiple)
        return cls(places, jobs, at)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def units_of(region: Region) -> int:
    """Size of the factors of a region alone, for one k."""
    rows = Rows.of(region)
    return 0 if rows is None else rows.units()


def split(regions: Sequence[Region], room: int) -> list[list[Region]]:
    """The regions in order, as many at a time as have ``room`` units of factors; at least one."""
    parts: list[list[Region]] = []
    part: list[Region] = []
    used = 0
    for region in regions:
        units = units_of(region)
        if part and used + units > room:
            parts.append(part)
            part, used = [], 0
        part.append(region)
        used += units
    return [*parts, part]
