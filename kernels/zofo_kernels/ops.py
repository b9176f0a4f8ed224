"""The four operations on weights: noise, perturb_, perturbed, update_.

All take a list of tensors as one flat vector: tensor ``i`` draws the noise of parameter
``indices[i]`` (default ``i``) from element ``offsets[i]`` (default 0) on. Tensors may have
any of the dtypes float32, float64, bfloat16 and float16, any device and any strides; empty ones
are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .direction import Direction, Shift, check_direction
from .dispatch import backend_for
from .interrupt import uninterrupted
from .table import Slot

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROUNDINGS = ("stochastic", "nearest")
_FLOAT32_MAX = torch.finfo(torch.float32).max


def check_weight(tensor: Tensor, name: str = "tensor") -> None:
    """Raise TypeError or ValueError where a tensor cannot be perturbed in place.

    Raises:
        TypeError: not a dense tensor of a floating dtype that the kernels know.
        ValueError: a meta tensor, or one whose elements share memory (an expanded tensor).
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(
            f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, which cannot be "
            f"perturbed (quantised, complex and integer weights have no direction to move in); "
            f"it must be one of {known}"
        )
    wrapper = torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor)
    if wrapper or tensor.layout != torch.strided:
        kind = type(tensor).__name__ if wrapper else tensor.layout
        raise TypeError(
            f"{name} is a {kind}, not a dense tensor: quantised, sharded and sparse weights "
            "cannot be perturbed in place"
        )
    if tensor.is_meta:
        raise ValueError(f"{name} must hold data, got a tensor on the meta device")
    if not tensor.is_contiguous() and torch._debug_has_internal_overlap(tensor) == 1:
        raise ValueError(f"{name} must not share memory among its elements (expanded tensor)")


def _check_list(
    name: str, values: Sequence[int] | None, default: list[int], limit: int
) -> Sequence[int]:
    if values is None:
        return default
    if len(values) != len(default):
        raise ValueError(f"{name} must have one entry a tensor ({len(default)}), got {len(values)}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must hold ints, got {value!r}")
        if not 0 <= value < limit:
            raise ValueError(f"{name} must be in [0, {limit}), got {value}")
    return values


@contextmanager
def _slots(
    tensors: Sequence[Tensor], indices: Sequence[int] | None, offsets: Sequence[int] | None
) -> Iterator[dict[torch.device, list[Slot]]]:
    """Contiguous slots by device. Copies of non-contiguous tensors are written back at the end."""
    if isinstance(tensors, Tensor):
        raise TypeError("tensors must be a sequence of tensors, got one tensor; pass [tensor]")
    count = len(tensors)
    indices = _check_list("indices", indices, list(range(count)), 1 << 32)
    offsets = _check_list("offsets", offsets, [0] * count, 1 << 63)
    by_device: dict[torch.device, list[Slot]] = {}
    seen: set[int] = set()
    copies: list[tuple[Tensor, Tensor]] = []
    for position, (tensor, index, offset) in enumerate(zip(tensors, indices, offsets, strict=True)):
        check_weight(tensor, f"tensors[{position}]")
        if tensor.numel() == 0:
            continue
        if id(tensor) in seen:
            raise ValueError(f"tensors[{position}] must not be in the list twice")
        seen.add(id(tensor))
        tensor = tensor.detach()
        dense = tensor.resolve_neg().contiguous()
        if dense.data_ptr() != tensor.data_ptr():
            copies.append((tensor, dense))
        by_device.setdefault(tensor.device, []).append(Slot(dense, index, offset))
    yield by_device
    for tensor, dense in copies:
        tensor.copy_(dense)


def _changed(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that data changed, as torch's own in-place operations do."""
    for tensor in tensors:  # older torch takes one at a time
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _check_shift(name: str, shift: Shift | None) -> None:
    if shift is None:
        return
    if not isinstance(shift, Shift):
        raise TypeError(f"{name} must be a zofo_kernels.Shift, got {shift!r}")
    check_direction(shift.direction)
    _check_finite(f"{name}.scale", shift.scale)


def _check_finite(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not abs(value) <= _FLOAT32_MAX:
        raise ValueError(f"{name} must be a finite float32 number, got {value!r}")


def noise(
    shape: Sequence[int],
    direction: Direction,
    *,
    index: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """The direction's values z for one parameter, as a tensor.

    Args:
        shape: shape of the result; elements are numbered row-major from ``offset`` on.
        direction: which noise; see :class:`Direction`.
        index: the parameter's index among the zeroth-order parameters.
        offset: number of the first element in the full parameter.
        dtype: float32, float64, bfloat16 or float16; z is computed in fp32, then rounded.
        device: where the result lives.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        Tensor of ``shape`` with E[z] = 0 and E[z^2] = 1, |z| < 5.8 for Gaussian noise.
    """
    check_direction(direction)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    with torch.no_grad(), _slots([out], [index], [offset]) as by_device:
        for where, slots in by_device.items():
            backend_for(where, backend).fill_noise(slots[0], direction)
    return out


def perturb_(
    tensors: Sequence[Tensor],
    direction: Direction | None,
    scale: float = 0.0,
    *,
    recover: Shift | None = None,
    indices: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """w <- RN(w + scale * z) in place, in one pass over the weights.

    With ``recover`` the weights first lose the shift that they carry:
    w <- RN(RN(w - recover.scale * z') + scale * z). Recovering before the next perturbation,
    rather than adding the difference, keeps 16-bit weights near where they were. RN rounds to
    nearest in the weight's dtype; arithmetic is fp32 (fp64 for fp64 weights).

    Args:
        tensors: weights, changed in place.
        direction: the direction to add; None to recover only.
        scale: its scale, the paper's perturbation step size mu, with sign.
        recover: the shift to take off first.
        indices, offsets, backend: see the module and :func:`noise`.

    Raises:
        TypeError, ValueError: a tensor, direction or scale that cannot be used; nothing is
            changed.
        RuntimeError: the backend is not available here.
    """
    shifts = []
    _check_shift("recover", recover)
    if recover is not None:
        shifts.append(Shift(recover.direction, -recover.scale))
    if direction is not None:
        check_direction(direction)
        _check_finite("scale", scale)
        shifts.append(Shift(direction, scale))
    if not shifts:
        return
    with torch.no_grad(), uninterrupted(), _slots(tensors, indices, offsets) as by_device:
        engines = {device: backend_for(device, backend) for device in by_device}
        for device, slots in by_device.items():
            engines[device].perturb(slots, shifts)
        _changed(tensors)


def perturbed(
    tensor: Tensor,
    direction: Direction,
    scale: float,
    *,
    index: int = 0,
    offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """RN(w + scale * z) as a new contiguous tensor; ``tensor`` is not written. See perturb_."""
    check_weight(tensor)
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    perturb_([out], direction, scale, indices=[index], offsets=[offset], backend=backend)
    return out


def update_(
    tensors: Sequence[Tensor],
    directions: Sequence[Direction],
    coefficients: Tensor,
    lr: float | Tensor,
    *,
    weight_decay: float = 0.0,
    recover: Shift | None = None,
    rounding: str = "stochastic",
    indices: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """w <- round(w0 - lr (sum_s c_s z_s + weight_decay w0)) in one pass, w0 the recovered weight.

    Args:
        tensors: weights, changed in place.
        directions: S directions z_s.
        coefficients: shape (S,), floating, on any device: the projected gradients c_s. They and
            a tensor ``lr`` stay on the device; nothing waits for them.
        lr: learning rate, a number or a one-element tensor.
        weight_decay: L2 coefficient, coupled as in ``torch.optim.SGD``.
        recover: the shift that the weights carry, taken off first: w0 = RN(w - scale * z').
        rounding: "stochastic" or "nearest", for bfloat16 and float16; float32 and float64
            round to nearest always. Stochastic bits belong to ``directions[0]``.
        indices, offsets, backend: see the module and :func:`noise`.

    Raises:
        TypeError, ValueError: an argument that cannot be used; nothing is changed.
        RuntimeError: the backend is not available here.
    """
    if len(directions) == 0:
        raise ValueError("directions must hold at least one direction, got none")
    for direction in directions:
        check_direction(direction)
    if not isinstance(coefficients, Tensor):
        raise TypeError(f"coefficients must be a tensor, got {type(coefficients).__name__}")
    if coefficients.shape != (len(directions),) or not coefficients.is_floating_point():
        raise ValueError(
            f"coefficients must be a floating tensor of shape ({len(directions)},), got "
            f"{tuple(coefficients.shape)} of {coefficients.dtype}"
        )
    if not isinstance(lr, Tensor):
        _check_finite("lr", lr)
    elif lr.numel() != 1 or lr.is_complex():
        raise ValueError(
            f"lr must have one element and be real, got shape {tuple(lr.shape)} of {lr.dtype}"
        )
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}")
    _check_finite("weight_decay", weight_decay)
    _check_shift("recover", recover)
    with torch.no_grad(), uninterrupted(), _slots(tensors, indices, offsets) as by_device:
        engines = {device: backend_for(device, backend) for device in by_device}
        for device, slots in by_device.items():
            rate = _on_device(lr, device)
            engines[device].update(
                slots,
                directions,
                coefficients.detach().to(device, non_blocking=True),
                rate,
                float(weight_decay),
                recover,
                rounding == "stochastic",
            )
        _changed(tensors)


def _on_device(lr: float | Tensor, device: torch.device) -> Tensor:
    """lr as a 0-dim tensor on ``device``; a number fills it without waiting for the device."""
    if isinstance(lr, Tensor):
        return lr.detach().reshape(()).to(device, non_blocking=True)
    real = torch.float32 if device.type == "mps" else torch.float64
    return torch.full((), float(lr), dtype=real, device=device)
