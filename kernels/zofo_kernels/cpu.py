"""CPU backend: numba kernels over a table of runs, on as many threads as torch uses."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import cpu_kernels as kernels
from .backend import replay_in_turn
from .cpu_tables import (
    Factors,
    Table,
    in_parts,
    key_rows,
    room_for,
    roots,
    size_of_factors,
    tables,
    with_factors,
)
from .direction import Direction, Shift
from .memo import kept
from .program import Program
from .region import Region, Regions, passed_of
from .structure import FactorJob

if sys.byteorder != "little":
    raise ImportError("the numba kernels need a little-endian host")

_MIN_PER_THREAD = 32768  # elements; below that a thread costs more than it saves
_PIECE = 512 * kernels.CHUNK  # elements a thread takes at a time
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    """A forked child has none of the parent's threads."""
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _get_pool(threads: int) -> ThreadPoolExecutor:
    # Our own threads rather than numba's: its portable layer aborts the process when two
    # Python threads enter it at once. An outgrown pool finishes its work and goes.
    global _pool, _pool_size
    if _pool is None or _pool_size < threads:
        _pool, _pool_size = ThreadPoolExecutor(threads, "zofo-kernels"), threads
    return _pool


def _coarse_rows(shifts: Sequence[Shift], dtype: torch.dtype) -> NDArray[np.int64]:
    """What ``run_passes`` calls ``coarse``: int64, shape (shifts, 2)."""
    if len(shifts) == 1:
        return _coarse_row(shifts[0].coarse_from(dtype), shifts[0].back)
    sizes = np.array([s.coarse_from(dtype) for s in shifts], dtype=np.float32)
    backs = np.array([s.back for s in shifts], dtype=np.int64)
    return np.stack([sizes.view(np.int32).astype(np.int64), backs], axis=1)


@functools.lru_cache(maxsize=64)
def _coarse_row(size: float, back: bool) -> NDArray[np.int64]:
    return np.array([[np.float32(size).view(np.int32), back]], dtype=np.int64)


_COMPUTE = {torch.float32: np.float32, torch.float64: np.float64}
_NO_STEPS = {kind: np.empty(0, dtype=numpy_kind) for kind, numpy_kind in _COMPUTE.items()}
_NO_DECAY = {kind: np.zeros(1, dtype=numpy_kind) for kind, numpy_kind in _COMPUTE.items()}
_NONE = np.empty(0, dtype=np.float32)


def _run(
    regions: Sequence[Region],
    shifts: Sequence[Shift],
    directions: Sequence[Direction] = (),
    coefficients: Tensor | None = None,
    lr: Tensor | None = None,
    weight_decay: float = 0.0,
    stochastic: bool = False,
) -> None:
    """One pass: shifts, then the update where directions are given."""
    along = [*(s.direction for s in shifts), *directions]
    shift_ends, key_ends = np.array([len(shifts)]), np.array([len(directions)])
    parts = _parts(regions, along)
    memory = np.empty(max(size_of_factors(part, along) for part, _ in parts), dtype=np.float32)
    launches = []
    for table, done in ((table, done) for part, done in parts for table in tables(part)):
        compute = torch.float64 if table.dtype == torch.float64 else torch.float32
        scales = torch.tensor([s.scale for s in shifts], dtype=compute, device="cpu").numpy()
        steps, decay = _NO_STEPS[compute], _NO_DECAY[compute]
        if coefficients is not None and lr is not None:
            rate = lr.to(compute)
            steps = (rate * coefficients.to(compute)).numpy()
            if weight_decay != 0:
                factor = torch.tensor(weight_decay, dtype=compute, device="cpu")
                decay = (rate * factor).reshape(1).numpy()
        keys, factors = with_factors(along, table, memory)
        divisors, cut = roots(along, _COMPUTE[compute]), len(shifts)
        program = (
            *(shift_ends, keys[:cut], scales, divisors[:cut], _coarse_rows(shifts, table.dtype)),
            *(key_ends, keys[cut:], steps, divisors[cut:], decay, stochastic),
        )
        launches.append(_Launch(table, program, factors, done))
    _launch(launches)


def _parts(
    regions: Sequence[Region], along: Sequence[Direction] = ()
) -> list[tuple[Sequence[Region], Callable[[], None] | None]]:
    """Regions that are launched together, and what is called when that is over."""
    passed = passed_of(regions)
    if passed is None:
        return [(part, None) for part in in_parts(regions, along)]
    return [(Regions([one]), partial(passed, one.tensor)) for one in regions]


class _Launch(NamedTuple):
    table: Table
    program: tuple[Any, ...]
    """What ``run_passes`` takes after the range, but for the factors."""
    factors: Factors
    done: Callable[[], None] | None
    """What is called afterwards."""

    def run(self, low: int, high: int) -> None:
        factors = self.factors
        kernels.run_passes(
            *self.table.columns, low, high, *self.program, factors.memory, factors.units
        )


def _launch(launches: Sequence[_Launch]) -> None:
    """Each table in turn; nothing is allocated or compiled once the first weight is written."""
    if len(launches) > 1:
        for launch in launches:
            launch.run(0, 0)
    for launch in launches:
        elements = launch.table.elements
        _fill(launch.factors)
        # whole chunks, so that no chunk's noise is drawn twice
        size = -(-elements // _threads(elements) // kernels.CHUNK) * kernels.CHUNK
        _in_threads(launch.run, elements, min(_PIECE, size))
        if launch.done is not None:
            launch.done()


def _fill(factors: Factors) -> None:
    directions = len(factors.rows)
    if directions:
        threads = _threads(directions * factors.units)
        _in_threads(factors.fill, directions, -(-directions // threads))


def _threads(elements: int) -> int:
    """As many as they keep busy."""
    return max(1, min(torch.get_num_threads(), elements // _MIN_PER_THREAD))


def _in_threads(do: Callable[[int, int], None], total: int, size: int) -> None:
    """``do(low, high)`` for pieces of [0, total) of that size, by the threads as they come free.

    Pieces, since a core may be busy for a while: torch's own threads spin on after each of its
    operations.
    """
    pieces = iter([(low, min(low + size, total)) for low in range(0, total, size)])
    threads = min(torch.get_num_threads(), -(-total // size))

    def work() -> None:
        for low, high in pieces:  # next() of a list's iterator is atomic
            do(low, high)

    futures: list[Future[None]] = []
    try:
        with suppress(RuntimeError):  # where no thread can be started, the others do its work
            for _ in range(threads - 1):
                futures.append(_get_pool(threads - 1).submit(work))
        work()
    finally:
        for future in futures:
            future.result()


def perturb(regions: Sequence[Region], shifts: Sequence[Shift]) -> None:
    """See :meth:`Backend.perturb`."""
    _run(regions, shifts)


def perturb_copy(regions: Sequence[Region], sources: Sequence[Tensor], shift: Shift) -> None:
    """See :meth:`Backend.perturb_copy`. Called for many small tensors, so it must cost little."""
    for region, source in zip(regions, sources, strict=True):
        region.tensor.copy_(source)
    _run(regions, [shift])


def update(
    regions: Sequence[Region],
    directions: Sequence[Direction],
    coefficients: Tensor,
    lr: Tensor,
    weight_decay: float,
    recover: Shift | None,
    stochastic: bool,
) -> None:
    """See :meth:`Backend.update`."""
    shifts = () if recover is None else (recover.taken_off(),)
    _run(regions, shifts, directions, coefficients, lr, weight_decay, stochastic)


def replay(regions: Sequence[Region], program: Program, stochastic: bool) -> None:
    """See :meth:`Backend.replay`. Each chunk goes through all passes while it is in the cache."""
    if any(direction.rank for direction in _directions(program)):
        replay_in_turn(perturb, update, regions, program, stochastic)  # else factors are many
        return
    launches = []
    for table, done in ((table, done) for part, done in _parts(regions) for table in tables(part)):
        compute = np.float64 if table.dtype == torch.float64 else np.float32
        arrays = _arrays(program, table.dtype, compute)
        factors = with_factors((), table, _NONE)[1]
        launches.append(_Launch(table, (*arrays, stochastic), factors, done))
    _launch(launches)


def _directions(program: Program) -> Iterator[Direction]:
    for one in program.passes:
        yield from (shift.direction for shift in one.shifts)
        yield from one.directions


@kept
def _arrays(program: Program, dtype: torch.dtype, compute: type) -> tuple[Any, ...]:
    """The program as ``run_passes`` takes it, for weights of this dtype."""
    passes = program.passes

    def array(values: Iterable[float]) -> NDArray[Any]:
        return np.array(list(values), dtype=compute)

    shifts = [shift for one in passes for shift in one.shifts]
    counts = np.array([len(one.directions) for one in passes], dtype=np.int64)
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers that are not finite
        lr = array(one.lr for one in passes)
        decay = array(one.weight_decay for one in passes)
        steps = np.repeat(lr, counts) * array(c for one in passes for c in one.coefficients)
        decays = np.where(decay == 0, decay, lr * decay)
    along = [direction for one in passes for direction in one.directions]
    return (
        np.cumsum([len(one.shifts) for one in passes]),
        key_rows([shift.direction for shift in shifts]),
        array(shift.scale for shift in shifts),
        roots((shift.direction for shift in shifts), compute),
        _coarse_rows(shifts, dtype),
        np.cumsum(counts),
        key_rows(along),
        steps,
        roots(along, compute),
        decays,
    )


def factors(
    jobs: Sequence[FactorJob], directions: Sequence[Direction], device: torch.device
) -> Tensor:
    """See :meth:`Backend.factors`."""
    memory, rank = room_for(jobs, directions), directions[0].rank
    _fill(memory)
    return torch.from_numpy(memory.memory).view(len(directions), rank, memory.units)


def fill_noise(out: Region, direction: Direction) -> None:
    """See :meth:`Backend.fill_noise`."""
    out.tensor.zero_()
    _run([out], [Shift(direction, 1.0)])
