"""All that is measured of a case after its check: time, host time, memory, operations."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from experiments.measure import growth, stored_bytes
from zofo_kernels._torch_compat import TorchDispatchMode

from .registry import Case
from .timing import Effort, Samples, interleave, synchronise


@dataclass(frozen=True)
class Measured:
    """By variant; ``peak_bytes`` also by what the case compares them with."""

    seconds: Mapping[str, Samples]
    host_seconds: Mapping[str, Samples] = field(default_factory=dict)
    peak_bytes: Mapping[str, int | None] = field(default_factory=dict)


def measure(case: Case, device: torch.device, effort: Effort) -> Measured:
    """Memory first, while the variants hold nothing. On the CPU all time is the host's."""
    peaks = case.peaks() if case.peaks is not None else {}
    seconds = interleave(case.variants, device, effort)
    host: Mapping[str, Samples] = {}
    if case.host and device.type != "cpu":
        host = interleave(case.variants, device, effort, host=True)
    return Measured(seconds, host, peaks)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that reach torch's kernels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.number += 1
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], object], device: torch.device) -> dict[str, int | None]:
    """Torch operations of one call, and on CUDA kernels launched."""
    run()  # compiles
    operations = _Operations()
    with operations:
        run()
    return {"torch_operations": operations.number, "launches": launches(run, device)}


def launches(run: Callable[[], object], device: torch.device) -> int | None:
    """Kernels that one call runs on the device, copies and fills aside; None if not known."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    synchronise(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        synchronise(device)
    kernels = [
        event.name
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return len(kernels) or None  # every pass launches something: 0 means that none was seen


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory allocated during the second call, all that lives beside it included.

    On the CPU: of tensors, see :func:`experiments.measure.growth`.
    """
    if device.type == "cpu":
        gc.collect()
        before = stored_bytes(t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
        return before + growth(run).left + growth(run).most
    if device.type != "cuda":
        return None
    run()
    free_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device)


def free_memory(device: torch.device) -> None:
    """Give back the device's memory that nothing refers to."""
    if device.type == "cuda":
        gc.collect()
        synchronise(device)
        torch.cuda.empty_cache()
