"""CPU backend: numba kernels over a table of tensors, on as many threads as torch uses."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import cpu_kernels as kernels
from .direction import Direction, Shift
from .passes import Passes
from .table import Slot

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
_DISTRIBUTION = {"gaussian": kernels.GAUSSIAN, "rademacher": kernels.RADEMACHER}

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
    rows = [(*d.key(), _DISTRIBUTION[d.distribution]) for d in directions]
    return np.array(rows, dtype=np.int64).reshape(len(rows), 3)


def _tables(slots: Sequence[Slot]) -> list[tuple[torch.dtype, int, tuple[Any, ...]]]:
    """For each dtype: number of elements, and the kernel's first arguments.

    Made once where the sequence has a cache.
    """
    cache: dict[str, Any] = getattr(slots, "cache", {})
    if "cpu" not in cache:
        cache["cpu"] = tables = []
        for dtype, (code, storage) in _STORAGE.items():
            chosen = [slot for slot in slots if slot.tensor.dtype == dtype]
            if not chosen:
                continue
            sizes = [slot.tensor.numel() for slot in chosen]
            table = (
                np.empty(0, dtype=storage),
                code,
                np.array([slot.tensor.data_ptr() for slot in chosen], dtype=np.int64),
                np.array(sizes, dtype=np.int64),
                np.array([slot.parameter for slot in chosen], dtype=np.int64),
                np.array([slot.offset for slot in chosen], dtype=np.uint64),
            )
            tables.append((dtype, sum(sizes), table))
    found: list[tuple[torch.dtype, int, tuple[Any, ...]]] = cache["cpu"]
    return found


def _run(
    slots: Sequence[Slot],
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
    for dtype, total, table in _tables(slots):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        scales = torch.tensor([s.scale for s in shifts], dtype=compute).numpy()
        steps, decay = torch.empty(0, dtype=compute), torch.zeros(1, dtype=compute)
        if coefficients is not None and lr is not None:
            rate = lr.to(compute)
            steps = rate * coefficients.to(compute)
            decay = (rate * torch.tensor(weight_decay, dtype=compute)).reshape(1)
        keys = shift_ends, shift_keys, scales, key_ends, update_keys
        launches.append((total, table, (*keys, steps.numpy(), decay.numpy(), stochastic)))
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
        with suppress(RuntimeError):  # no more threads to be had: those that there are do it
            for _ in range(threads - 1):
                futures.append(_get_pool(threads - 1).submit(work))
        work()
    finally:
        for future in futures:
            future.result()


def perturb(slots: Sequence[Slot], shifts: Sequence[Shift]) -> None:
    """See :func:`zofo_kernels.reference.perturb`."""
    _run(slots, shifts)


_NO_KEYS = _key_rows([])
_NO_STEPS = {kind: np.empty(0, dtype=kind) for kind in (np.float32, np.float64)}
_NO_DECAY = {kind: np.zeros(1, dtype=kind) for kind in (np.float32, np.float64)}
_ONE, _NONE_OF_ONE = np.array([1]), np.array([0])


@functools.lru_cache(maxsize=64)
def _fixed_key_rows(direction: Direction) -> NDArray[np.int64]:
    """Of one direction whose step is a number."""
    return _key_rows([direction])


def perturb_copy(slots: Sequence[Slot], sources: Sequence[Tensor], shift: Shift) -> None:
    """See :func:`zofo_kernels.reference.perturb_copy`. Called for many small ones: costs little."""
    for slot, source in zip(slots, sources, strict=True):
        slot.tensor.copy_(source)
    direction = shift.direction
    keys = _fixed_key_rows(direction) if type(direction.step) is int else _key_rows([direction])
    for dtype, total, table in _tables(slots):
        compute = np.float64 if dtype == torch.float64 else np.float32
        scales = np.array([shift.scale], dtype=compute)
        update = _NONE_OF_ONE, _NO_KEYS, _NO_STEPS[compute], _NO_DECAY[compute], False
        _in_threads(total, table, (_ONE, keys, scales, *update))


def update(
    slots: Sequence[Slot],
    directions: Sequence[Direction],
    coefficients: Tensor,
    lr: Tensor,
    weight_decay: float,
    recover: Shift | None,
    stochastic: bool,
) -> None:
    """See :func:`zofo_kernels.reference.update`."""
    shifts = () if recover is None else (Shift(recover.direction, -recover.scale),)
    _run(slots, shifts, directions, coefficients, lr, weight_decay, stochastic)


def replay(slots: Sequence[Slot], passes: Passes, stochastic: bool) -> None:
    """All passes in turn, a chunk that fits in the cache at a time."""
    launches = []
    for dtype, total, table in _tables(slots):
        compute = np.float64 if dtype == torch.float64 else np.float32
        if compute not in passes.cache:
            passes.cache[compute] = _program(passes, compute)
        launches.append((total, table, (*passes.cache[compute], stochastic)))
    _launch(launches)


def _program(passes: Passes, compute: type) -> tuple[Any, ...]:
    """What ``run_passes`` takes of the passes."""

    def array(values: Iterable[float]) -> NDArray[Any]:
        return np.array(list(values), dtype=compute)

    shifts = [shift for one in passes for shift in one.shifts]
    counts = np.array([len(one.directions) for one in passes], dtype=np.int64)
    lr = array(one.lr for one in passes)
    coefficients = array(c for one in passes for c in one.coefficients)
    return (
        np.cumsum([len(one.shifts) for one in passes]),
        _key_rows([shift.direction for shift in shifts]),
        array(shift.scale for shift in shifts),
        np.cumsum(counts),
        _key_rows([direction for one in passes for direction in one.directions]),
        np.repeat(lr, counts) * coefficients,
        lr * array(one.weight_decay for one in passes),
    )


def fill_noise(out: Slot, direction: Direction) -> None:
    """See :func:`zofo_kernels.reference.fill_noise`."""
    out.tensor.zero_()
    _run([out], [Shift(direction, 1.0)])
