"""Which backend serves a device, and why another cannot."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "cpu", "reference")
_DEVICE_TYPE = {"triton": "cuda", "cpu": "cpu"}


@functools.cache
def unavailable_reason(backend: str) -> str | None:
    """Why ``backend`` ("triton", "cpu" or "reference") cannot be used here; None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        try:
            importlib.import_module(".triton", __package__)
        except ImportError as error:
            return f"the Triton kernels cannot be imported ({error})"
        return None if torch.cuda.is_available() else "torch sees no CUDA device"
    try:
        importlib.import_module(".cpu", __package__)
    except ImportError as error:
        return f"numba cannot be used ({error}); pip install 'zofo-optim[cpu]'"
    return None


@functools.cache
def _warn_slow(device_type: str, backend: str) -> None:
    warnings.warn(
        f"zofo_kernels: the slow reference backend serves {device_type!r} tensors, because "
        f"{unavailable_reason(backend)}",
        stacklevel=5,
    )


def backend_for(device: torch.device, backend: str = "auto") -> ModuleType:
    """The module that serves tensors on ``device``.

    "auto": Triton on CUDA, numba on the CPU, the reference anywhere else and, with one warning,
    where the fast one is missing.

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
    if _DEVICE_TYPE.get(backend, device.type) != device.type:
        raise ValueError(
            f"backend={backend!r} serves {_DEVICE_TYPE[backend]} tensors, got a tensor on {device}"
        )
    return importlib.import_module(f".{backend}", __package__)
