"""Interleaved timing: A, B, A, B, ... in one run, so that drift of the machine hits all alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

LEAST_REPEATS = 7


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Args:
        repeats: rounds of the interleaved timing.
        budget: seconds; slow cases get fewer rounds, down to ``LEAST_REPEATS``.
        sample: seconds that one sample should last at least; short calls are repeated in it.
    """

    repeats: int
    budget: float = 1e9
    sample: float = 0.005


@dataclass(frozen=True)
class Samples:
    """Seconds a call of one variant, one sample a round, each the mean of ``calls`` calls."""

    seconds: tuple[float, ...]
    calls: int


def synchronise(device: torch.device) -> None:
    """Wait for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage collection within the block."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def _host_sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Until each call returns; the device is idle when it starts, and never waited for in it."""
    spent = 0.0
    for _ in range(calls):
        synchronise(device)
        start = time.perf_counter()
        run()
        spent += time.perf_counter() - start
    synchronise(device)
    return spent / calls


def interleave(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    effort: Effort,
    *,
    host: bool = False,
) -> dict[str, Samples]:
    """Time all variants in turn; every variant has been called before the first sample.

    A sample ends when the device has done the work, or with ``host`` when the last call returns.
    """
    take = _host_sample if host else _sample
    with quiet_collector():
        calls = {}
        for name, run in variants.items():
            take(run, 1, device)  # warm-up
            calls[name] = max(1, math.ceil(effort.sample / max(_sample(run, 1, device), 1e-9)))
        start = time.perf_counter()
        rounds = [{name: take(run, calls[name], device) for name, run in variants.items()}]
        affordable = int(effort.budget / (time.perf_counter() - start))
        repeats = min(effort.repeats, max(affordable, min(LEAST_REPEATS, effort.repeats)))
        while len(rounds) < repeats:
            rounds.append({name: take(run, calls[name], device) for name, run in variants.items()})
    return {name: Samples(tuple(one[name] for one in rounds), calls[name]) for name in variants}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 20/80 percentiles."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), (0.2, 0.5, 0.8))
    return {"median": tidy(middle), "p20": tidy(low), "p80": tidy(high)}


def tidy(value: float) -> float:
    """Six digits, more than any timing has."""
    return float(f"{value:.6g}")


class CompileTimer:
    """Seconds that numba spends compiling within the block; 0 where its cache had everything."""

    def __init__(self) -> None:
        self._listener: Any = None

    def __enter__(self) -> CompileTimer:
        try:
            from numba.core import event
        except ImportError:
            return self
        self._listener = event.TimingListener()
        event.register("numba:compile", self._listener)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listener is not None:
            from numba.core import event

            event.unregister("numba:compile", self._listener)

    @property
    def seconds(self) -> float:
        done = self._listener is not None and self._listener.done
        return float(self._listener.duration) if done else 0.0
