"""The operations on weights: noise, factors, perturb_, perturbed, update_, replay_.

All take a list of tensors as one flat vector: tensor ``i`` draws the noise of parameter
``indices[i]`` (default ``i``) from element ``offsets[i]`` (default 0) on. Tensors may have
any of the dtypes float32, float64, bfloat16 and float16, any device and any strides; empty ones
are skipped. ``Weights`` in place of the list saves the host's work on repeated passes.

Weights are written in inference mode: only there may torch write all of them, those that require
gradients and those that were made in inference mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import Backend, widest_float
from .direction import Direction, Shift, check_direction, check_finite, check_shift
from .dispatch import backend_for
from .interrupt import uninterrupted
from .memory import to_device
from .program import Program
from .region import Region, regions_of_rows
from .structure import STREAM_LEFT, STREAM_RIGHT, FactorJob, matrix_of
from .weights import DTYPES, Weights, as_weights, check_places, check_rectangles, check_weight

ROUNDINGS = ("stochastic", "nearest")


def noise(
    shape: Sequence[int],
    direction: Direction,
    *,
    index: int = 0,
    offset: int = 0,
    full_shape: Sequence[int] | None = None,
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
        full_shape: of the full parameter, which low rank depends on; default ``shape``.
        dtype: float32, float64, bfloat16 or float16; z is computed in fp32, then rounded (of low
            rank, in fp64 for fp64).
        device: where the result lives.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        Tensor of ``shape`` with E[z] = 0 and E[z^2] = 1, |z| < 5.8 for full Gaussian noise.
    """
    check_direction(direction)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    with torch.inference_mode():
        for where, regions in (
            Weights([out], [index], [offset], shapes=[full_shape]).layout().parts()
        ):
            backend_for(where, backend).fill_noise(regions[0], direction)
    return out


def perturb_(
    tensors: Weights | Sequence[Tensor],
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
        tensors: weights, changed in place: a list of tensors, or :class:`Weights`.
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
    if recover is not None:
        check_shift("recover", recover)
        shifts.append(recover.taken_off())
    if direction is not None:
        check_direction(direction)
        check_finite("scale", scale)
        shifts.append(Shift(direction, scale))
    if not shifts:
        return
    weights = as_weights(tensors, indices, offsets)
    with uninterrupted(), torch.inference_mode():
        layout = weights.layout()
        engines = {device: backend_for(device, backend) for device in layout.devices}
        for device, regions in layout.parts():
            engines[device].perturb(regions, shifts)
        weights.mark_changed()


def perturbed(
    tensor: Tensor,
    direction: Direction,
    scale: float,
    *,
    index: int = 0,
    offset: int = 0,
    rectangle: tuple[int, int] | None = None,
    full_shape: Sequence[int] | None = None,
    rows: Tensor | None = None,
    backend: str | Backend = "auto",
) -> Tensor:
    """RN(w + scale * z) as a new contiguous tensor; ``tensor`` is not written. See perturb_.

    Args:
        tensor, direction, scale, index, offset: see :func:`perturb_`.
        rectangle: row length and row stride of a tensor whose rows have gaps between them in the
            full parameter; see :class:`Weights`.
        full_shape: of the parameter that ``tensor`` is a part of; default the tensor's own.
        rows: for a matrix, row numbers of any shape: ``perturbed(tensor, ...)[rows]`` to the bit,
            without the rest. The host reads them.
        backend: a name, or what ``backend_for`` gave, which saves looking it up.
    """
    check_weight(tensor)
    check_direction(direction)
    check_finite("scale", scale)
    (run,), extents = check_rectangles([rectangle], [tensor.numel()])
    check_places([index], [offset], extents)
    shift = Shift(direction, float(scale))
    matrix = matrix_of(tensor.shape if full_shape is None else full_shape)
    engine = backend_for(tensor.device, backend) if isinstance(backend, str) else backend
    if rows is not None:
        if rectangle is not None:
            raise ValueError(f"rectangle must be None where rows are given, got {rectangle}")
        out = torch.embedding(tensor.detach(), rows).resolve_neg()
        if out.numel() > 0:
            copies, numbers = out.view(-1, tensor.shape[1]), rows.flatten().tolist()
            engine.perturb(regions_of_rows(copies, numbers, index, offset, matrix), [shift])
        return out
    content = tensor.detach().resolve_neg().contiguous()
    out = torch.empty_like(content)
    if out.numel() > 0:
        engine.perturb_copy([Region(out, index, offset, *run, matrix)], [content], shift)
    return out


def factors(
    shapes: Sequence[Sequence[int]],
    directions: Sequence[Direction],
    *,
    indices: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    backend: str | Backend = "auto",
) -> list[tuple[Tensor, Tensor]]:
    """U and V of the low-rank directions of some parameters: z = U V^T / sqrt(rank).

    Args:
        shapes: of the full parameters, each of which is a matrix or a stack of matrices for
            ``matrix_of``.
        directions: S of them, of one rank r >= 1.
        indices: the parameters' indices among the zeroth-order parameters; default 0, 1, ...
        device: where they live.
        backend: see :func:`perturbed`.

    Returns:
        For each parameter U^T, shape (S, r, m), and V^T, shape (S, r, n), float32; for a stack of
        E matrices (S, r, E m) and (S, r, E n), one after the other. They share memory.
    """
    if not directions:
        raise ValueError("directions must hold at least one direction, got none")
    for direction in directions:
        check_direction(direction)
    ranks = sorted({direction.rank for direction in directions})
    if len(ranks) > 1 or ranks[0] < 1:
        raise ValueError(f"directions must be of one rank, at least 1, got ranks {ranks}")
    jobs = []
    places, _ = check_places(indices, None, [0] * len(shapes))
    for position, (shape, parameter) in enumerate(zip(shapes, places, strict=True)):
        matrix = matrix_of(shape)
        if matrix is None:
            raise ValueError(f"shapes[{position}] must be of a matrix, got {tuple(shape)}")
        left = math.prod(shape) // matrix.columns
        right = left // matrix.rows * matrix.columns
        jobs += [
            FactorJob(parameter, STREAM_LEFT, 0, left),
            FactorJob(parameter, STREAM_RIGHT, 0, right),
        ]
    if not jobs:
        return []
    device = torch.device(device)
    engine = backend_for(device, backend) if isinstance(backend, str) else backend
    made = engine.factors(jobs, directions, device)
    parts = torch.split(made, [job.rows for job in jobs], dim=-1)
    return list(zip(parts[::2], parts[1::2], strict=True))


def update_(
    tensors: Weights | Sequence[Tensor],
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
        tensors: weights, changed in place: a list of tensors, or :class:`Weights`.
        directions: S directions z_s.
        coefficients: shape (S,), floating, on any device: the projected gradients c_s. They and
            a tensor ``lr`` stay on the device; nothing waits for them, but weights on the CPU.
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
        check_finite("lr", lr)
    elif lr.numel() != 1 or lr.is_complex():
        raise ValueError(
            f"lr must have one element and be real, got shape {tuple(lr.shape)} of {lr.dtype}"
        )
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}")
    check_finite("weight_decay", weight_decay)
    if recover is not None:
        check_shift("recover", recover)
    weights = as_weights(tensors, indices, offsets)
    with uninterrupted(), torch.inference_mode():
        layout = weights.layout()
        engines = {device: backend_for(device, backend) for device in layout.devices}
        given = coefficients.detach().resolve_neg()
        # all copies before any device's weights are written
        numbers = {
            device: (to_device(given, device), _on_device(lr, device)) for device in layout.devices
        }
        for device, regions in layout.parts():
            engines[device].update(
                regions,
                directions,
                *numbers[device],
                float(weight_decay),
                recover,
                rounding == "stochastic",
            )
        weights.mark_changed()


def replay_(
    tensors: Weights | Sequence[Tensor],
    program: Program,
    *,
    rounding: str = "stochastic",
    indices: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """Many passes over the weights, bit for bit as ``perturb_`` and ``update_`` do them in turn.

    On the CPU every few thousand weights go through all of them while they are in a core's cache,
    and noise that successive shifts and the update share is made once.

    Args:
        tensors: weights, changed in place: a list of tensors, or :class:`Weights`.
        program: what to do; keep the object where it is used again.
        rounding, indices, offsets, backend: see :func:`update_`.

    Raises:
        TypeError, ValueError: an argument that cannot be used; nothing is changed.
        RuntimeError: the backend is not available here.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}")
    if not isinstance(program, Program):
        raise TypeError(f"program must be a zofo_kernels.Program, got {type(program).__name__}")
    weights = as_weights(tensors, indices, offsets)
    with uninterrupted(), torch.inference_mode():
        layout = weights.layout()
        engines = {device: backend_for(device, backend) for device in layout.devices}
        for device, regions in layout.parts():
            engines[device].replay(regions, program, rounding == "stochastic")
        weights.mark_changed()


def _on_device(lr: float | Tensor, device: torch.device) -> Tensor:
    """lr as a 0-dim tensor on ``device``; a number fills it without waiting for the device."""
    if isinstance(lr, Tensor):
        return to_device(lr.detach().resolve_neg().reshape(()), device)
    return torch.full((), float(lr), dtype=widest_float(device), device=device)
