"""CPU backend: numba kernels over a table of runs, on as many threads as torch uses."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import cpu_kernels as kernels
from .direction import Direction, Shift
from .distributions import BY_NAME
from .memo import kept
from .program import Program
from .region import Region, Regions

if sys.byteorder != "little":
    raise ImportError("the numba kernels need a little-endian host")

_MIN_PER_THREAD = 32768  # elements; below that a thread costs more than it saves
_PIECE = 512 * kernels.CHUNK  # elements a thread takes at a time
_STORAGE = {
    torch.float32: (kernels.FP32, np.float32),
    torch.bfloat16: (kernels.BF16, np.uint16),
    torch.float16: (kernels.FP16, np.uint16),
    torch.float64: (kernels.FP64, np.float64),
}

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


def _key_rows(directions: Sequence[Direction]) -> NDArray[np.int64]:
    """Key low, key high and distribution of each direction: int64, shape (directions, 3)."""
    if len(directions) == 1 and type(directions[0].step) is int:
        return _fixed_key_row(directions[0])
    return _make_key_rows(directions)


@functools.lru_cache(maxsize=64)
def _fixed_key_row(direction: Direction) -> NDArray[np.int64]:
    """Of a direction whose step is a number: a tensor may change."""
    return _make_key_rows([direction])


def _make_key_rows(directions: Sequence[Direction]) -> NDArray[np.int64]:
    rows = [(*d.key(), BY_NAME[d.distribution].code) for d in directions]
    return np.array(rows, dtype=np.int64).reshape(len(rows), 3)


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


class _Table(NamedTuple):
    """Runs of one dtype: their elements in all, and the kernel's first arguments."""

    dtype: torch.dtype
    elements: int
    columns: tuple[Any, ...]


def _tables(regions: Sequence[Region]) -> list[_Table]:
    return _kept_tables(regions) if type(regions) is Regions else _build(regions)


@kept
def _kept_tables(regions: Regions) -> list[_Table]:
    return _build(regions)


def _build(regions: Sequence[Region]) -> list[_Table]:
    """A table for each dtype, a row for each run."""
    by_dtype: dict[torch.dtype, list[Region]] = {}
    for region in regions:
        by_dtype.setdefault(region.tensor.dtype, []).append(region)
    tables = []
    for dtype, alike in by_dtype.items():
        (code, storage), width = _STORAGE[dtype], dtype.itemsize
        rows = [
            (region.tensor.data_ptr() + width * start, size, region.parameter, offset)
            for region in alike
            for start, size, offset in region.runs()
        ]
        addresses, sizes, indices, offsets = zip(*rows, strict=True)
        columns = (
            np.empty(0, dtype=storage),
            code,
            np.array(addresses, dtype=np.int64),
            np.array(sizes, dtype=np.int64),
            np.array(indices, dtype=np.int64),
            np.array(offsets, dtype=np.uint64),
        )
        tables.append(_Table(dtype, sum(sizes), columns))
    return tables


_NO_KEYS = _key_rows([])
_COMPUTE = {torch.float32: np.float32, torch.float64: np.float64}
_NO_STEPS = {kind: np.empty(0, dtype=numpy_kind) for kind, numpy_kind in _COMPUTE.items()}
_NO_DECAY = {kind: np.zeros(1, dtype=numpy_kind) for kind, numpy_kind in _COMPUTE.items()}
_ONE, _NONE_OF_ONE = np.array([1]), np.array([0])


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
    shift_keys, update_keys = _key_rows([s.direction for s in shifts]), _key_rows(directions)
    shift_ends, key_ends = np.array([len(shifts)]), np.array([len(directions)])
    launches = []
    for dtype, total, table in _tables(regions):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        scales = torch.tensor([s.scale for s in shifts], dtype=compute, device="cpu").numpy()
        steps, decay = _NO_STEPS[compute], _NO_DECAY[compute]
        if coefficients is not None and lr is not None:
            rate = lr.to(compute)
            steps = (rate * coefficients.to(compute)).numpy()
            if weight_decay != 0:
                factor = torch.tensor(weight_decay, dtype=compute, device="cpu")
                decay = (rate * factor).reshape(1).numpy()
        coarse = _coarse_rows(shifts, dtype)
        keys = shift_ends, shift_keys, scales, coarse, key_ends, update_keys
        launches.append((total, table, (*keys, steps, decay, stochastic)))
    _launch(launches)


def _launch(launches: Sequence[tuple[int, tuple[Any, ...], tuple[Any, ...]]]) -> None:
    """Each dtype in turn; nothing is allocated or compiled once the first weight is written."""
    if len(launches) > 1:
        for _, table, program in launches:
            kernels.run_passes(*table, 0, 0, *program)
    for total, table, program in launches:
        _in_threads(total, table, program)


def _in_threads(total: int, table: tuple[Any, ...], program: tuple[Any, ...]) -> None:
    """Elements [0, total) in pieces, taken by the threads as they come free.

    Pieces, since a core may be busy for a while: torch's own threads spin on after each of its
    operations.
    """
    threads = max(1, min(torch.get_num_threads(), total // _MIN_PER_THREAD))
    # whole chunks, so that no chunk's noise is drawn twice
    size = min(_PIECE, -(-total // threads // kernels.CHUNK) * kernels.CHUNK)
    pieces = iter([(low, min(low + size, total)) for low in range(0, total, size)])

    def work() -> None:
        for low, high in pieces:  # next() of a list's iterator is atomic
            kernels.run_passes(*table, low, high, *program)

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
    keys = _key_rows([shift.direction])
    for dtype, total, table in _tables(regions):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        scales = np.array([shift.scale], dtype=_NO_STEPS[compute].dtype)
        update = _NONE_OF_ONE, _NO_KEYS, _NO_STEPS[compute], _NO_DECAY[compute], False
        coarse = _coarse_rows([shift], dtype)
        _in_threads(total, table, (_ONE, keys, scales, coarse, *update))


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
    launches = []
    for dtype, total, table in _tables(regions):
        compute = np.float64 if dtype == torch.float64 else np.float32
        launches.append((total, table, (*_arrays(program, dtype, compute), stochastic)))
    _launch(launches)


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
    return (
        np.cumsum([len(one.shifts) for one in passes]),
        _key_rows([shift.direction for shift in shifts]),
        array(shift.scale for shift in shifts),
        _coarse_rows(shifts, dtype),
        np.cumsum(counts),
        _key_rows([direction for one in passes for direction in one.directions]),
        steps,
        decays,
    )


def fill_noise(out: Region, direction: Direction) -> None:
    """See :meth:`Backend.fill_noise`."""
    out.tensor.zero_()
    _run([out], [Shift(direction, 1.0)])
