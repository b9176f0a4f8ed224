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

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from . import reference
from . import triton_kernels as kernels
from .backend import replay_in_turn
from .direction import KEY_VERSION, Direction, Shift
from .distributions import BY_NAME
from .memo import kept
from .program import Program
from .region import Region, Regions
from .structure import FactorJob

_OLDEST = (3, 4)
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
    raise ImportError(f"Triton must be 3.4 or later, got {triton.__version__}")

INTERPRETED = not isinstance(kernels.pass_kernel, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels, on CPU tensors."""

VECTORS = 512
"""Vectors of 8 elements a program. With 4 warps a thread has 32 elements, 64 bytes of bf16 in
flight. Registers then let a multiprocessor (sm_90) hold all of its threads where 16-bit weights are
perturbed in place; in other passes in place 44 to 75 % of them for bf16 and 31 to 75 % for fp16; in
all passes 44 to 50 % for fp32 and 19 to 25 % for fp64. ``benchmarks/sass.py`` counts them."""
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
_NO_ROW = [0] * kernels.COLUMNS.value


class _Launch(NamedTuple):
    """What one launch works on: runs of one dtype, all aligned or all not.

    ``only`` is the row of the only run, passed by value; else ``table`` and ``items`` are on the
    device. Where they are not read they are any tensors.
    """

    dtype: torch.dtype
    aligned: bool
    programs: int
    table: Tensor
    items: Tensor
    only: list[int] | None = None


def _rows(region: Region, source: Tensor, multiple: int) -> Iterator[tuple[bool, list[int]]]:
    """The region's rows of the kernels' table, with whether each is aligned.

    A run that is aligned but for its last elements gives two rows. ``multiple`` is what the offset
    of an aligned one divides by.
    """
    width = region.tensor.element_size()
    base = region.tensor.data_ptr(), source.data_ptr()
    for start, size, offset in region.runs():
        addresses = [address + start * width for address in base]
        aligned = all(address % 16 == 0 for address in addresses) and offset % multiple == 0
        body = size // 8 * 8 if aligned else 0
        for yes, low, high in ((True, 0, body), (False, body, size)):
            if low < high:
                to, read = (address + low * width for address in addresses)
                yield yes, [to, high - low, offset + low, region.parameter, read]


def _items(rows: NDArray[np.int64], aligned: bool) -> NDArray[np.int64]:
    """Each row's pieces: row + 2^32 * piece."""
    lead = 0 if aligned else rows[:, 2] % 128
    pieces = -(-(rows[:, 1] + lead) // (8 * VECTORS))
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    piece = np.arange(int(pieces.sum()), dtype=np.int64) - first
    items: NDArray[np.int64] = np.repeat(np.arange(len(rows), dtype=np.int64), pieces) + (
        piece << 32
    )
    return items


def _launches(
    regions: Sequence[Region], sources: Sequence[Tensor] | None, multiple: int
) -> list[_Launch]:
    """The launches of a pass; those of :class:`Regions` in place are made once a multiple."""
    if type(regions) is Regions and sources is None:
        return _kept_launches(regions, multiple)
    if len(regions) == 1 and len(regions[0].runs()) == 1:
        source = regions[0].tensor if sources is None else sources[0]
        rows = _rows(regions[0], source, multiple)
        return [_single(regions[0], aligned, row) for aligned, row in rows]
    return _build(regions, sources, multiple)


@kept
def _kept_launches(regions: Regions, multiple: int) -> list[_Launch]:
    return _build(regions, None, multiple)


def _single(region: Region, aligned: bool, row: list[int]) -> _Launch:
    """A launch that needs no table, for a run that serves one pass."""
    lead = 0 if aligned else row[2] % 128
    programs = -(-(row[1] + lead) // (8 * VECTORS))
    return _Launch(region.tensor.dtype, aligned, programs, region.tensor, region.tensor, row)


def _build(
    regions: Sequence[Region], sources: Sequence[Tensor] | None, multiple: int
) -> list[_Launch]:
    device = regions[0].tensor.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the table of the weights' addresses must be built before a CUDA graph is captured: "
            "run the same step on the same tensors once before capturing it"
        )
    groups: dict[tuple[torch.dtype, bool], list[list[int]]] = {}
    for region, source in zip(regions, sources or [r.tensor for r in regions], strict=True):
        for aligned, row in _rows(region, source, multiple):
            groups.setdefault((region.tensor.dtype, aligned), []).append(row)
    made = []
    for (dtype, aligned), rows in groups.items():
        table = np.array(rows, dtype=np.int64)
        items = _items(table, aligned)
        buffer = torch.from_numpy(np.concatenate([table.ravel(), items]))
        if device.type == "cuda":
            buffer = buffer.pin_memory()
        buffer = buffer.to(device, non_blocking=True)
        parts = buffer[: table.size], buffer[table.size :]
        made.append(_Launch(dtype, aligned, items.size, *parts))
    return made


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
            high - low,
            version=KEY_VERSION,
            STEP_ON_DEVICE=on_device,
            BLOCK=_KEYS_PER_LAUNCH,
            num_warps=1,
        )
        low = high
    return keys


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
    """One pass: at most two shifts, or at most one and the update."""
    along = [*(shift.direction for shift in shifts), *directions]
    distributions = [BY_NAME[direction.distribution] for direction in along]
    kinds = [distribution.code for distribution in distributions]
    # whole Philox calls: no direction is drawn in smaller steps than rounding bits are
    multiple = max(distribution.elements_per_call for distribution in distributions)
    launches = _launches(regions, sources, multiple)
    scales = [_bits(shift.scale) for shift in shifts] + [0, 0]
    on_device = len(directions) > 1 or any(isinstance(d.step, Tensor) for d in along)
    words = [0, 0, 0, 0]
    if not on_device:
        words = [word for direction in along for word in direction.key()] + words
        words = words[:4] if shifts else [0, 0, *words[:2]]
    update = kinds[-1] if directions else _NONE
    if len(set(kinds[len(shifts) :])) > 1:
        update = kernels.MIXED.value
    variant = {
        "SOURCE": source,
        "KIND_A": kinds[0] if shifts else _NONE,
        "KIND_B": kinds[1] if len(shifts) == 2 else _NONE,
        "UPDATE": update,
        "SAME": len(along) == 2
        and _same_step(*along)
        and (along[0]._replace(step=0) == along[1]._replace(step=0)),
        "SEVERAL": len(directions) > 1,
        "DECAY": weight_decay != 0,
        "KEYS_ON_DEVICE": on_device,
    }
    backs = sum(2**k * shift.back for k, shift in enumerate(shifts))
    device = regions[0].tensor.device
    with _on(device):
        unread = launches[0].table
        keys = _device_keys(along, device) if on_device else unread
        pointers = [keys, *(unread if t is None else t for t in (coefficients, lr))]
        scalars = [*words, *scales[:2], _bits(weight_decay), len(directions)]
        for launch in launches:
            sizes = [shift.coarse_from(launch.dtype) for shift in shifts]
            coarse = [_bits32(size) for size in (*sizes, math.inf, math.inf)][:2]
            variant["COARSE"] = not all(map(math.isinf, sizes))
            _start(launch, pointers, [*scalars, *coarse, backs], variant, stochastic)


def _start(
    launch: _Launch,
    pointers: Sequence[Tensor],
    scalars: Sequence[int],
    variant: dict[str, Any],
    stochastic: bool,
) -> None:
    kernels.pass_kernel[(launch.programs,)](
        launch.table,
        launch.items,
        *pointers,
        *scalars,
        *(launch.only or _NO_ROW),
        ONLY=launch.only is not None,
        STORAGE=_DTYPES[launch.dtype],
        ALIGNED=launch.aligned,
        STOCHASTIC=stochastic and launch.dtype in (torch.bfloat16, torch.float16),
        **variant,
        VECTORS=VECTORS,
        NATIVE=not INTERPRETED and torch.version.hip is None,
        num_warps=COARSE_WARPS if variant["COARSE"] else WARPS,
        enable_fp_fusion=False,
    )


def perturb(regions: Sequence[Region], shifts: Sequence[Shift]) -> None:
    """See :meth:`Backend.perturb`."""
    for low in range(0, len(shifts), 2):
        _run(regions, shifts[low : low + 2])


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
    shifts = () if recover is None else (recover.taken_off(),)
    _run(regions, shifts, directions, coefficients.contiguous(), lr, weight_decay, stochastic)


def replay(regions: Sequence[Region], program: Program, stochastic: bool) -> None:
    """See :meth:`Backend.replay`."""
    replay_in_turn(perturb, update, regions, program, stochastic)


def factors(
    jobs: Sequence[FactorJob], directions: Sequence[Direction], device: torch.device
) -> Tensor:
    """See :meth:`Backend.factors`."""
    return reference.factors(jobs, directions, device)


def fill_noise(out: Region, direction: Direction) -> None:
    """See :meth:`Backend.fill_noise`."""
    _run([out], [Shift(direction, 1.0)], source=_NO_SOURCE)
