"""Directions of low rank as closed forms need them: factors of matrices, displaced vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zofo_kernels import (
    Backend,
    Direction,
    Region,
    Regions,
    Shift,
    backend_for,
    factors,
    matrix_of,
    perturbed,
)
from zofo_kernels._torch_compat import without_functorch

from ..offload.device_visits import visits_of
from ..sharding import is_sharded, pieces_of
from .base import written


class Source(NamedTuple):
    """A parameter, its place in the noise, its name and the position of its group."""

    parameter: Tensor
    noise_index: int
    name: str
    group: int
    held: Tensor
    """What the optimizer has; the parameter itself, unless it is sharded."""

    @property
    def device(self) -> torch.device:
        """That torch functions compute with it on."""
        visits = visits_of(self.parameter)
        return self.parameter.device if visits is None else visits.device

    def content(self) -> Tensor:
        """The parameter on that device, detached."""
        visits = visits_of(self.parameter)
        return self.parameter.detach() if visits is None else visits.on_device(self.parameter)

    @property
    def is_fleeting(self) -> bool:
        """Whether the parameter has memory only while a module computes with it."""
        return self.held is not self.parameter

    @property
    def is_distributed(self) -> bool:
        """Whether torch functions get a DTensor, as in tensor parallelism."""
        return is_sharded(self.parameter)

    def pieces(self, tensor: Tensor, shift: Shift, backend: str | Backend) -> Iterator[Tensor]:
        """The displaced parameter, as far as this process holds ``tensor``, in order.

        Args:
            tensor: the parameter, or what the optimizer has of it.
            shift: the displacement.
            backend: on the parameter's device, whose dtype is computed with, too.
        """
        to, device = self.parameter, self.device
        for piece in pieces_of(tensor, self.name):
            yield perturbed(
                piece.tensor.detach().to(device, to.dtype),
                shift.direction,
                shift.scale,
                index=self.noise_index,
                offset=piece.offset,
                rectangle=piece.rectangle,
                full_shape=to.shape,
                backend=backend,
            )


class Displacement:
    """What closed forms need of one evaluation: S displacements of every group.

    Args:
        low_rank: of all sources.
        shifts: of each displacement, one a group.
        sides: so many in a row are along the same direction.
    """

    def __init__(
        self, low_rank: LowRank, shifts: Sequence[Sequence[Shift]], sides: int = 1
    ) -> None:
        self._sides = sides
        self._matrices = low_rank.factors(
            [[shift.direction for shift in of_sample] for of_sample in shifts[::sides]]
        )
        self._low_rank, self._shifts = low_rank, shifts
        self._vectors: dict[int, Tensor] = {}
        rank = shifts[0][0].direction.rank
        self._weights = [
            [shift.scale / math.sqrt(rank) for shift in of_group]
            for of_group in zip(*shifts, strict=True)
        ]
        self._alike = [weights.count(weights[0]) == len(weights) for weights in self._weights]
        self._different: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def factors(self, source: Source, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
        """Displacements of a matrix are weight left^T right.

        Returns:
            left, shape (D, r, m), right, (D, r, n), of the directions, and weight, a number, or
            (D, S / D, 1) where displacements have different ones.
        """
        left, right = self._matrices.of(source, dtype)
        weights = self._weights[source.group]
        if self._alike[source.group]:
            return left, right, weights[0]
        key = source.group, dtype, left.device
        if key not in self._different:
            self._different[key] = self._each(weights, dtype, left.device)
        return left, right, self._different[key]

    def _each(self, weights: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weights, shape (D, sides, 1)."""
        shape = len(weights) // self._sides, self._sides, 1
        if self._sides == 2 and weights == [weights[0], -weights[0]] * shape[0]:
            each = torch.full(shape, weights[0], dtype=dtype, device=device)  # no copy to a GPU
            each[:, 1].neg_()
            return each
        return torch.tensor(weights, dtype=dtype, device="cpu").view(shape).to(device)

    def vector(self, source: Source) -> Tensor | None:
        """A vector in each displacement, flat, shape (S, n); None for a matrix."""
        where = id(source.parameter)
        if where not in self._vectors:
            self._vectors |= self._low_rank.vectors(source, self._shifts)
        return self._vectors.get(where)


class LowRank:
    """Makes displacements of the sources, in memory that is kept from one to the next.

    Factors are made once for all displacements along the same directions.
    """

    def __init__(self, sources: Iterable[Source], backend: str) -> None:
        self._all = list(sources)
        self._kinds = self._kinds_now()
        whole = [s for s in self._all if s.parameter.numel() > 0 and not s.is_distributed]
        by_device: dict[torch.device, list[Source]] = {}
        for source in whole:
            by_device.setdefault(source.device, []).append(source)
        self._engines = {device: backend_for(device, backend) for device in by_device}
        self._matrices: dict[tuple[torch.device, int], list[Source]] = {}
        for source in whole:  # directions are a group's own
            if matrix_of(source.parameter.shape) is not None:
                key = source.device, source.group
                self._matrices.setdefault(key, []).append(source)
        self._vectors: dict[int, _Vectors] = {}
        for device, kinds in by_device.items():
            for some in _alike([s for s in kinds if matrix_of(s.parameter.shape) is None]):
                vectors = _Vectors(some, self._engines[device])
                self._vectors |= {id(s.parameter): vectors for s in some}
        self._along: tuple[Sequence[Sequence[Direction]], object] = (), None
        self._factors = _Factors({})

    def _kinds_now(self) -> list[tuple[object, ...]]:
        return [(s.parameter.shape, s.parameter.dtype, s.device) for s in self._all]

    def is_outdated(self) -> bool:
        """Whether a parameter was converted, moved or given another shape since."""
        return self._kinds_now() != self._kinds

    def factors(self, directions: Sequence[Sequence[Direction]]) -> _Factors:
        """Of all matrices, along these directions: of each sample, one a group."""
        now = [[_number(direction) for direction in of_sample] for of_sample in directions]
        if self._along[1] != now:
            self._along, self._factors = ((), None), _Factors({})
            found: dict[int, tuple[Tensor, Tensor]] = {}
            for (device, group), some in self._matrices.items():
                with without_functorch(), torch.inference_mode(False):
                    made = factors(
                        [s.parameter.shape for s in some],
                        [of_sample[group] for of_sample in directions],
                        indices=[s.noise_index for s in some],
                        device=device,
                        backend=self._engines[device],
                    )
                    for source, both in zip(some, made, strict=True):
                        dtype = source.parameter.dtype
                        found[id(source.parameter)] = both[0].to(dtype), both[1].to(dtype)
            # directions too: tensors among them keep their ids
            self._along, self._factors = (directions, now), _Factors(found)
        return self._factors

    def forget(self) -> None:
        """Free the factors: a step needs them no more."""
        self._along, self._factors = ((), None), _Factors({})

    def vectors(self, source: Source, shifts: Sequence[Sequence[Shift]]) -> dict[int, Tensor]:
        """A displaced vector and others like it, by ``id`` of the parameter, shape (S, n).

        None for a matrix.
        """
        some = self._vectors.get(id(source.parameter))
        if some is None:
            return {}
        with without_functorch():
            return some.displaced(shifts)


def _number(direction: Direction) -> tuple[object, ...]:
    """Which noise it has, without waiting for a step that is on the device and may advance."""
    step = direction.step
    if isinstance(step, Tensor):
        return (id(step), *written(step), *direction._replace(step=0))
    return direction


class _Factors:
    """U^T, (S, r, m), and V^T, (S, r, n), by ``id`` of the parameter.

    Of its dtype; others on demand.
    """

    def __init__(self, made: dict[int, tuple[Tensor, Tensor]]) -> None:
        self._made = made
        self._others: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def of(self, source: Source, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        left, right = self._made[id(source.parameter)]
        if left.dtype == dtype:
            return left, right
        key = (id(source.parameter), dtype)
        if key not in self._others:
            with without_functorch(), torch.inference_mode(False):
                self._others[key] = left.to(dtype), right.to(dtype)
        return self._others[key]


def _alike(sources: Iterable[Source]) -> Iterable[list[Source]]:
    """Of one dtype and one group; fleeting ones alone, as they are not there at one time."""
    found: dict[tuple[object, ...], list[Source]] = {}
    for source in sources:
        alone = id(source.parameter) if source.is_fleeting else None
        found.setdefault((source.parameter.dtype, source.group, alone), []).append(source)
    return found.values()


class _Vectors:
    """Copies of vectors, all in one tensor, so that a pass over them costs the host little."""

    def __init__(self, sources: list[Source], engine: Backend) -> None:
        self._sources = sources
        self._engine = engine
        self._sizes = [s.parameter.numel() for s in sources]
        self._memory: Tensor | None = None
        self._regions: list[Regions] = []

    def displaced(self, shifts: Sequence[Sequence[Shift]]) -> dict[int, Tensor]:
        if len(self._regions) < len(shifts):
            self._make_room(len(shifts))
        assert self._memory is not None
        with torch.inference_mode():
            base = torch.cat([s.parameter.detach().reshape(-1) for s in self._sources])
            for row, regions, of_sample in zip(self._memory, self._regions, shifts, strict=False):
                row.copy_(base)
                self._engine.perturb(regions, [of_sample[self._sources[0].group]])
        parts = torch.split(self._memory[: len(shifts)], self._sizes, dim=1)
        return {id(s.parameter): part for s, part in zip(self._sources, parts, strict=True)}

    def _make_room(self, samples: int) -> None:
        first = self._sources[0].parameter
        with torch.inference_mode(False):
            self._memory = torch.empty(
                samples, sum(self._sizes), dtype=first.dtype, device=first.device
            )
        self._regions = [
            Regions(
                Region(part, source.noise_index)
                for source, part in zip(self._sources, torch.split(row, self._sizes), strict=True)
            )
            for row in self._memory.unbind()
        ]
