"""The moves since the last update, in memory that does not grow with repetitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .listeners import Move


class Moves:
    """A sequence of moves; excursions that repeat are kept once, with their number.

    An excursion ends where the weights are restored. Those of one step are alike: a loop that
    calls ``backward`` and ``zero_grad`` without ``step`` makes the same one again and again, and
    each of them may round the weights.

    Args:
        moves: the first ones.
    """

    def __init__(self, moves: Iterable[Move] = ()) -> None:
        self._runs: list[tuple[tuple[Move, ...], int]] = []
        self._open: list[Move] = []  # the excursion that has not ended
        for move in moves:
            self.append(move)

    def append(self, move: Move) -> None:
        self._open.append(move)
        if not any(move.scales):
            self._add(tuple(self._open), 1)
            self._open = []

    def _add(self, excursion: tuple[Move, ...], count: int) -> None:
        if self._runs and self._runs[-1][0] == excursion:
            count += self._runs.pop()[1]
        self._runs.append((excursion, count))

    def clear(self) -> None:
        self._runs.clear()
        self._open.clear()

    def __len__(self) -> int:
        return sum(len(moves) * count for moves, count in self._runs) + len(self._open)

    def __iter__(self) -> Iterator[Move]:
        for moves, count in self._runs:
            for _ in range(count):
                yield from moves
        yield from self._open

    def saved(self) -> list[Any]:
        """Plain values: moves one by one, and excursions that repeat as a dictionary."""
        found: list[Any] = []
        for moves, count in (*self._runs, (tuple(self._open), 1)):
            plain = [[move.sample, list(move.scales)] for move in moves]
            found += plain if count == 1 else [{"moves": plain, "times": count}]
        return found

    @classmethod
    def loaded(cls, saved: Iterable[Any]) -> Moves:
        """The inverse of :meth:`saved`."""
        found = cls()
        for entry in saved:
            if isinstance(entry, dict):
                moves = [Move(sample, tuple(scales)) for sample, scales in entry["moves"]]
                found._add(tuple(moves), entry["times"])
            else:
                sample, scales = entry
                found.append(Move(sample, tuple(scales)))
        return found
