"""Peak memory of one call, in bytes of live tensors, on a CPU or a CUDA device."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from zofo_optim.memory.torchao_weights import plain_tensors


def tensors_in(value: object) -> Iterable[Tensor]:
    """Every tensor in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    plain = [inner for tensor in tensors for inner in plain_tensors(tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}
    return sum(storages.values())


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what native code writes to stderr: the profiler talks about itself there."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


class Growth(NamedTuple):
    """Of the bytes in tensors on the CPU, over a call."""

    left: int
    """Those allocated by it and not freed, less those freed that were there before."""
    most: int
    """At one moment, above what was there before."""


def growth(call: Callable[[], object]) -> Growth:
    """As the profiler sees it in torch's CPU allocator."""
    gc.collect()  # or older garbage may be freed, and missed, during the call
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = profiler.profiler and profiler.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"] if results else []
    left = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        left += event.nbytes()
        most = max(most, left)
    return Growth(left, most)


def peak_memory(
    call: Callable[[], object],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> int:
    """The most bytes alive in tensors at one moment of `call()`.

    On CUDA: `torch.cuda.max_memory_allocated`. On the CPU the same quantity is put together from
    the weights, buffers and optimizer state that are there before the call, plus the largest
    growth that the profiler sees in torch's CPU allocator during it. It is exact and repeatable,
    unlike resident memory, which keeps what earlier work has freed; it leaves out the interpreter,
    the libraries and the small buffers that compiled CPU kernels keep for themselves.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return int(torch.cuda.max_memory_allocated(device))
    present = [*model.parameters(), *model.buffers(), *tensors_in(dict(optimizer.state))]
    present += [p.grad for p in model.parameters() if p.grad is not None]
    before = stored_bytes(present)
    del present  # or gradients that the call frees would live on
    return before + growth(call).most
