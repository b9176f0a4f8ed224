"""What streaming takes, without data: its copies and factors are made, and nothing is drawn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zofo_kernels import Direction, Shift, matrix_of

from ..costs.memory import LiveBytes
from ..perturbation.closed_forms import ClosedForms
from ..perturbation.low_rank import Displacement, LowRank, Source
from ..perturbation.streaming import _ROW_COST, Streaming
from ..saved_copies import SavedCopies
from ..settings import Settings


class RehearsedStreaming(Streaming):
    """Copies of the size of the perturbed ones.

    Args:
        sources, displaced, forms, saved: see :class:`Streaming`.
        reads_rows: of an embedding, where they are few: as on the CPU, whose host can read them.
    """

    def __init__(
        self,
        sources: Mapping[int, Source],
        *,
        reads_rows: bool,
        displaced: Collection[int] = (),
        forms: ClosedForms | None = None,
        saved: SavedCopies | None = None,
    ) -> None:
        shifts = [Shift(Direction(0, 0, 0), 1.0)]
        super().__init__(sources, shifts, "reference", displaced, forms, saved)
        self._reads_rows = reads_rows

    def _perturbed(
        self, source: Source, part: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        weight = (source.parameter if part is None else part).detach()
        return torch.empty_like(weight).contiguous() if rows is None else weight[rows]

    def _few_rows(self, rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> bool:
        few = rows.numel() * (weight.shape[1] + _ROW_COST) < weight.numel()
        where = id(weight)
        return few and self._reads_rows and where in self._sources and where not in self._displaced


class RehearsedCopies(SavedCopies):
    """Knows copies by their storages, as none has an address on the meta device."""

    def _place(self, storage: torch.UntypedStorage) -> int:
        return id(storage)


class RehearsedLowRank(LowRank):
    """Factors and displaced vectors of the sizes that they have."""

    def __init__(self, sources: Collection[Source]) -> None:
        super().__init__(sources, "reference")
        self._room: dict[tuple[torch.dtype, int], Tensor] = {}

    def factors(self, directions: Sequence[Sequence[Direction]]) -> Any:
        if self._along[1] is None:
            along = [one[0] for one in directions]
            self._factors = type(self._factors)(self._drawn(len(along), along[0].rank))
            self._along = directions, ()
        return self._factors

    def _drawn(self, samples: int, rank: int) -> dict[int, tuple[Tensor, Tensor]]:
        found = {}
        for some in self._matrices.values():
            sizes: list[int] = []
            for source in some:
                shape = source.parameter.shape
                matrix = matrix_of(shape)
                assert matrix is not None
                left = shape.numel() // matrix.columns
                sizes += [left, left // matrix.rows * matrix.columns]
            made = torch.empty(samples, rank, sum(sizes), device="meta")
            parts = torch.split(made, sizes, dim=-1)
            for source, left_part, right_part in zip(some, parts[::2], parts[1::2], strict=True):
                dtype = source.parameter.dtype
                found[id(source.parameter)] = left_part.to(dtype), right_part.to(dtype)
        return found

    def vectors(self, source: Source, shifts: Sequence[Sequence[Shift]]) -> dict[int, Tensor]:
        if matrix_of(source.parameter.shape) is not None:
            return {}
        alike = [
            s
            for s in self._all
            if matrix_of(s.parameter.shape) is None and s.parameter.dtype == source.parameter.dtype
        ]
        sizes = [s.parameter.numel() for s in alike]
        key = source.parameter.dtype, len(shifts)
        if key not in self._room:  # it stays from step to step
            self._room[key] = torch.empty(len(shifts), sum(sizes), dtype=key[0], device="meta")
        torch.empty(sum(sizes), dtype=key[0], device="meta")  # of the weights, for a moment
        parts = torch.split(self._room[key], sizes, dim=1)
        return {id(s.parameter): part for s, part in zip(alike, parts, strict=True)}


def sources_of(zeroth_order: Mapping[str, Tensor]) -> dict[int, Source]:
    """As streaming knows the parameters, by ``id``."""
    return {
        id(p): Source(p, number, name, 0, p)
        for number, (name, p) in enumerate(zeroth_order.items())
    }


def closed_forms(
    sources: Mapping[int, Source], low_rank: RehearsedLowRank, settings: Settings, examples: int
) -> ClosedForms:
    """Of an evaluation at displaced weights, by the optimizer's settings."""

    def displaced(count: int) -> Displacement:
        at = [
            [Shift(Direction(0, 0, number // settings.sides, rank=settings.rank), 1e-3)]
            for number in range(count)
        ]
        return Displacement(low_rank, at, settings.sides)

    return ClosedForms(
        sources,
        displaced,
        per_example=settings.directions == "per_example",
        each=settings.examples_per_direction,
        multiple=settings.examples_of_a_direction,
        examples=examples,
    )


def factor_bytes(sources: Mapping[int, Source], settings: Settings, examples: int) -> int:
    """Of the factors and displaced vectors that stay from one evaluation to the next."""
    low_rank = RehearsedLowRank(list(sources.values()))
    count = examples // settings.examples_per_direction if settings.directions != "shared" else 1
    with LiveBytes() as watch:
        at = [[Shift(Direction(0, 0, 0, rank=settings.rank), 1e-3)]] * count
        made = Displacement(low_rank, at, settings.sides)
        for source in sources.values():
            made.vector(source)
        return int(watch.now)
