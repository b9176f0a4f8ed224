"""Which backend serves a device, and why another cannot."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import TYPE_CHECKING, cast

import torch

from .backend import Backend

if TYPE_CHECKING:
    from . import cpu, reference, triton

    _BACKENDS: tuple[Backend, ...] = (reference, cpu, triton)

BACKENDS = ("auto", "triton", "cpu", "reference")
_DEVICE_TYPE = {"triton": "cuda", "cpu": "cpu"}


def unavailable_reason(backend: str) -> str | None:
    """Why ``backend`` ("triton", "cpu" or "reference") cannot be used here; None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _import_error("triton", "the Triton kernels", "triton") or _no_gpu()
    return _import_error("cpu", "numba", "cpu")


@functools.cache
def _import_error(module: str, what: str, extra: str) -> str | None:
    try:
        importlib.import_module(f".{module}", __package__)
    except ImportError as error:
        return f"{what} cannot be imported ({error}); pip install 'zofo-optim[{extra}]'"
    return None


def _no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    if not interpreting():
        return "torch sees no CUDA device"
    if not importlib.import_module(".triton", __package__).INTERPRETED:
        return "TRITON_INTERPRET must be set before Triton is imported"
    return None


def interpreting() -> bool:
    """Whether Triton's interpreter is asked for, by ``TRITON_INTERPRET=1``: for tests, slow."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


@functools.cache
def _warn_slow(device_type: str, backend: str) -> None:
    warnings.warn(
        f"zofo_kernels: the slow reference backend serves {device_type!r} tensors, because "
        f"{unavailable_reason(backend)}",
        stacklevel=5,
    )


def backend_for(device: torch.device, backend: str = "auto") -> Backend:
    """The backend that serves tensors on ``device``.

    "auto" is Triton on CUDA, numba on the CPU, and the reference on other devices; also, with one
    warning, where the fast one is missing. With ``TRITON_INTERPRET=1``, "triton" serves CPU
    tensors.

    Raises:
        ValueError: unknown backend, or one that does not serve this device.
        RuntimeError: the backend asked for is not available here; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        fast = {kind: name for name, kind in _DEVICE_TYPE.items()}.get(device.type)
        if fast is not None and unavailable_reason(fast) is None:
            backend = fast
        else:
            if fast is not None:
                _warn_slow(device.type, fast)
            backend = "reference"
    reason = unavailable_reason(backend)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}")
    serves = _DEVICE_TYPE.get(backend, device.type)
    if backend == "triton" and interpreting():
        serves = "cpu"
    if serves != device.type:
        raise ValueError(f"backend={backend!r} serves {serves} tensors, got a tensor on {device}")
    return cast(Backend, importlib.import_module(f".{backend}", __package__))


def backend_name(device: torch.device, backend: str) -> str:
    """The backend that serves ``device``: "cpu", "triton" or "reference"."""
    return backend_for(device, backend).__name__.rpartition(".")[2]
