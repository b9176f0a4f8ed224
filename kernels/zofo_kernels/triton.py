"""Triton backend: tables of runs on the device, and one launch a pass for each dtype.

Nothing here waits for the device, and all but the building of a table may be captured in a CUDA
graph. With ``TRITON_INTERPRET=1`` set before Triton is imported, the kernels are interpreted on
the CPU: slow, for tests.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_kernels as kernels
from . import triton_low_rank as low_rank
from . import triton_tables as tables
from .backend import replay_in_turn
from .direction import KEY_VERSION, ROUNDING_ELEMENTS_PER_CALL, Direction, Shift
from .distributions import BY_NAME
from .program import Program
from .region import Region
from .structure import STREAM_LEFT, STREAM_RIGHT, FactorJob
from .triton_tables import VECTORS, Factors, Launch, Multiples

_OLDEST = (3, 4)
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
    raise ImportError(f"Triton must be 3.4 or later, got {triton.__version__}")

INTERPRETED = not isinstance(kernels.pass_kernel, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels, on CPU tensors."""

_NATIVE = not INTERPRETED and torch.version.hip is None
WARPS = 4
COARSE_WARPS = 8
"""Of passes that may round coarse weights: rounding bits need registers, whether made or not."""

_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_NONE = kernels.NONE.value
_IN_PLACE, _COPY, _NO_SOURCE = (
    kernels.IN_PLACE.value,
    kernels.COPY.value,
    kernels.NO_SOURCE.value,
)
_KEYS_PER_LAUNCH = 64
_NO_FACTORS = [0] * 8
_UNROLLED = 4
"""The largest rank that the pass has code of its own for."""


def _bits(value: float) -> int:
    """The bits of a double, as int64."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


def _bits32(value: float) -> int:
    """The bits of a float of at least 0, which holds ``value`` exactly, or is infinite."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value if value < 2.0**128 else math.inf))
    return int(bits)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def _same_step(a: Direction, b: Direction) -> bool:
    """Without waiting for the device: different tensors count as different steps."""
    if isinstance(a.step, int) and isinstance(b.step, int):
        return a.step == b.step
    return a.step is b.step


def _device_keys(directions: Sequence[Direction], device: torch.device) -> Tensor:
    """Keys computed on the device, int32 (directions, 4): steps may be known only there."""
    keys = torch.empty((len(directions), 4), dtype=torch.int32, device=device)
    low = 0
    while low < len(directions):
        first, high = directions[low], low + 1
        while (
            high < len(directions)
            and high - low < _KEYS_PER_LAUNCH
            and directions[high].seed == first.seed
            and _same_step(directions[high], first)
            and directions[high].distribution == first.distribution
            and directions[high].rank == first.rank
            and directions[high].sample == first.sample + high - low
        ):
            high += 1
        on_device = isinstance(first.step, Tensor)
        if isinstance(first.step, Tensor) and first.step.device != device:
            raise ValueError(
                f"step must be on the device of the weights, {device}, got a tensor on "
                f"{first.step.device}"
            )
        kernels.keys_kernel[(1,)](
            keys[low:],
            first.seed,
            0 if on_device else first.step,
            first.step if on_device else keys,
            first.sample,
            BY_NAME[first.distribution].code,
            first.rank,
            high - low,
            version=KEY_VERSION,
            STEP_ON_DEVICE=on_device,
            BLOCK=_KEYS_PER_LAUNCH,
            num_warps=1,
        )
        low = high
    return keys


def _same(a: Direction, b: Direction) -> bool:
    return _same_step(a, b) and a._replace(step=0) == b._replace(step=0)


class _Blocks(NamedTuple):
    """Where the factors of a pass's directions are: in blocks, of one k each."""

    total: int
    firsts: list[int]
    """Of each direction, its first block."""
    made: list[int]
    """The directions that they are made for, in order."""

    @classmethod
    def of(cls, along: Sequence[Direction], shifts: int) -> _Blocks:
        """Those of the update follow one another; a shift may have those of another direction."""
        firsts, made, total = [0] * len(along), list[int](), 0
        for index in (*range(shifts, len(along)), *range(shifts)):
            direction = along[index]
            known = (i for i in made if index < shifts and _same(along[i], direction))
            same = next(known, None)
            firsts[index] = total if same is None else firsts[same]
            if same is None and direction.rank:
                made.append(index)
                total += direction.rank
        return cls(total, firsts, made)

    def alike(self, along: Sequence[Direction]) -> Iterator[tuple[int, int]]:
        """Runs of directions that one launch serves: the first, and how many."""
        first, count = self.made[0], 0
        for index in self.made:
            a, b = along[first], along[index]
            if index != first + count or (a.rank, a.distribution) != (b.rank, b.distribution):
                yield first, count
                first, count = index, 0
            count += 1
        yield first, count


def _fill(
    memory: Tensor,
    factors: Factors,
    along: Sequence[Direction],
    blocks: _Blocks,
    keys: Tensor | None,
) -> None:
    """Make all factors that a part needs. Without keys on the device, for each direction apart."""
    runs = blocks.alike(along) if keys is not None else ((index, 1) for index in blocks.made)
    for first, count in runs:
        direction = along[first]
        low_rank.factors_kernel[(factors.programs, count)](
            memory,
            factors.table if keys is None else keys[first:],
            factors.table,
            factors.items,
            *((0, 0) if keys is not None else direction.key()),
            direction.rank,
            blocks.firsts[first],
            factors.units,
            *(factors.only or _NO_FACTORS),
            LEFT=STREAM_LEFT,
            RIGHT=STREAM_RIGHT,
            KIND=BY_NAME[direction.distribution].code,
            ONLY=factors.only is not None,
            KEYS_ON_DEVICE=keys is not None,
            NATIVE=_NATIVE,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def _run(
    regions: Sequence[Region],
    shifts: Sequence[Shift],
    directions: Sequence[Direction] = (),
    coefficients: Tensor | None = None,
    lr: Tensor | None = None,
    weight_decay: float = 0.0,
    stochastic: bool = False,
    source: int = _IN_PLACE,
    sources: Sequence[Tensor] | None = None,
) -> None:
    """One pass: at most two shifts, or at most one and the update.

    Of low rank are all shifts or none; where the update has such directions, then those are all
    shifts.
    """
    along = [*(shift.direction for shift in shifts), *directions]
    blocks = _Blocks.of(along, len(shifts))
    multiples = Multiples(
        _multiple(along), _multiple([direction for direction in directions if not direction.rank])
    )
    parts = tables.parts(regions, sources, blocks.total, multiples)
    on_device = len(directions) > 1 or any(isinstance(d.step, Tensor) for d in along)
    words = [0, 0, 0, 0]
    if not on_device:
        words = [word for direction in along for word in direction.key()] + words
        words = words[:4] if shifts else [0, 0, *words[:2]]
    scales = [_bits(shift.scale) for shift in shifts] + [0, 0]
    scalars = [*words, *scales[:2], _bits(weight_decay), len(directions)]
    common = {
        "SOURCE": source,
        "SEVERAL": len(directions) > 1,
        "DECAY": weight_decay != 0,
        "KEYS_ON_DEVICE": on_device,
    }
    full = common | _full_variant(along, len(shifts))
    device = regions[0].tensor.device
    with _on(device):
        keys = _device_keys(along, device) if on_device else None
        pointers = [keys, coefficients, lr]
        needed = [part.factors.units for part in parts if part.factors is not None]
        size = blocks.total * max(needed, default=0)
        memory = torch.empty(size, dtype=torch.float32, device=device) if size else None
        for part in parts:
            for launch in part.full:
                _start(kernels.pass_kernel, launch, pointers, scalars, shifts, full, stochastic)
            if part.factors is None or memory is None:
                continue
            _fill(memory, part.factors, along, blocks, keys)
            where = [part.factors.units, *_where(along, len(shifts), blocks)]
            low = common | _low_rank_variant(along, len(shifts))
            for launch in part.low_rank:
                _start(
                    low_rank.low_rank_kernel,
                    launch,
                    [*pointers, memory],
                    scalars,
                    shifts,
                    low,
                    stochastic,
                    where,
                )


def _start(
    kernel: Any,
    launch: Launch,
    pointers: Sequence[Tensor | None],
    scalars: Sequence[int],
    shifts: Sequence[Shift],
    variant: dict[str, Any],
    stochastic: bool,
    more: Sequence[int] = (),
) -> None:
    sizes = [shift.coarse_from(launch.dtype) for shift in shifts]
    is_coarse = not all(map(math.isinf, sizes))
    coarse = [_bits32(size) for size in (*sizes, math.inf, math.inf)][:2]
    backs = sum(2**k * shift.back for k, shift in enumerate(shifts))
    columns = (low_rank if more else kernels).COLUMNS.value
    kernel[(launch.programs,)](
        launch.table,
        launch.items,
        *(launch.table if pointer is None else pointer for pointer in pointers),
        *scalars,
        *coarse,
        backs,
        *more,
        *(launch.only or [0] * columns),
        ONLY=launch.only is not None,
        STORAGE=_DTYPES[launch.dtype],
        ALIGNED=launch.aligned,
        STOCHASTIC=stochastic and launch.dtype in (torch.bfloat16, torch.float16),
        **variant,
        COARSE=is_coarse,
        VECTORS=VECTORS,
        NATIVE=_NATIVE,
        num_warps=COARSE_WARPS if is_coarse else WARPS,
        enable_fp_fusion=False,
    )


def _full_variant(along: Sequence[Direction], shifts: int) -> dict[str, Any]:
    """What ``pass_kernel`` is compiled for."""
    kinds = [BY_NAME[direction.distribution].code for direction in along]
    of_update = kinds[shifts:]
    update = of_update[-1] if of_update else _NONE
    return {
        "KIND_A": kinds[0] if shifts else _NONE,
        "KIND_B": kinds[1] if shifts == 2 else _NONE,
        "UPDATE": kernels.MIXED.value if len(set(of_update)) > 1 else update,
        "SAME": len(along) == 2 and _same(*along),
    }


def _low_rank_variant(along: Sequence[Direction], shifts: int) -> dict[str, Any]:
    """What ``low_rank_kernel`` is compiled for."""
    ranks = {direction.rank for direction in along}
    return {
        "A": shifts > 0,
        "B": shifts == 2,
        "UPDATE": len(along) > shifts,
        "RANK": min(ranks) if len(ranks) == 1 and max(ranks) <= _UNROLLED else 0,
        "MIXED": len({direction.rank for direction in along[shifts:]}) > 1,
    }


def _where(along: Sequence[Direction], shifts: int, blocks: _Blocks) -> list[int]:
    """Rank, root and first block of shift a, and of shift b or the update's first direction."""
    each = [
        [direction.rank, _bits(1 / math.sqrt(max(direction.rank, 1))), first]
        for direction, first in zip(along, blocks.firsts, strict=True)
    ]
    none = [0, 0, 0]
    a, b = [*([] if shifts else [none]), *each, none][:2]
    return [*a, *b]


def _multiple(along: Sequence[Direction]) -> int:
    """Elements of whole Philox calls; no direction is drawn in smaller steps than rounding bits."""
    calls = [BY_NAME[direction.distribution].elements_per_call for direction in along]
    return max([ROUNDING_ELEMENTS_PER_CALL, *calls])


def perturb(regions: Sequence[Region], shifts: Sequence[Shift]) -> None:
    """See :meth:`Backend.perturb`."""
    low = 0
    while low < len(shifts):
        high = low + 1
        if high < len(shifts) and _alike(shifts[low].direction, shifts[high].direction):
            high += 1
        _run(regions, shifts[low:high])
        low = high


def _alike(a: Direction, b: Direction) -> bool:
    """Whether both are of low rank or both are not: one pass serves them."""
    return (a.rank > 0) == (b.rank > 0)


def perturb_copy(regions: Sequence[Region], sources: Sequence[Tensor], shift: Shift) -> None:
    """See :meth:`Backend.perturb_copy`."""
    _run(regions, [shift], source=_COPY, sources=sources)


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
    shifts = [] if recover is None else [recover.taken_off()]
    of_low_rank = [direction for direction in directions if direction.rank]
    if recover is not None and not _alike(recover.direction, (of_low_rank or directions)[0]):
        _run(regions, shifts)
        shifts = []
    _run(regions, shifts, directions, coefficients.contiguous(), lr, weight_decay, stochastic)


def replay(regions: Sequence[Region], program: Program, stochastic: bool) -> None:
    """See :meth:`Backend.replay`."""
    replay_in_turn(perturb, update, regions, program, stochastic)


def factors(
    jobs: Sequence[FactorJob], directions: Sequence[Direction], device: torch.device
) -> Tensor:
    """See :meth:`Backend.factors`."""
    factors, rank = tables.factors_of(tuple(jobs), device), directions[0].rank
    shape = len(directions), rank, factors.units
    memory = torch.empty(shape, dtype=torch.float32, device=device)
    on_device = len(directions) > 1 or isinstance(directions[0].step, Tensor)
    with _on(device):
        keys = _device_keys(directions, device) if on_device else None
        _fill(memory, factors, directions, _Blocks.of(directions, 0), keys)
    return memory


def fill_noise(out: Region, direction: Direction) -> None:
    """See :meth:`Backend.fill_noise`."""
    _run([out], [Shift(direction, 1.0)], source=_NO_SOURCE)
