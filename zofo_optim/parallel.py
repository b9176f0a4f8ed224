"""Models that several processes share; only one process is supported where base weights train."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
"""Names of the classes, as importing them takes seconds."""


def processes() -> int:
    """How many train together."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def check_unshared(model: nn.Module) -> None:
    """Refuse a model with a part that is wrapped for several processes."""
    if processes() > 1:
        for module in model.modules():
            _check(module)


@contextmanager
def refused() -> Generator[None, None, None]:
    """Refuse to call such a model inside the block."""
    if processes() == 1:
        yield
        return

    def before(module: nn.Module, args: Any) -> None:
        _check(getattr(module, "_orig_mod", module))  # also within torch.compile

    hook = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


def _check(module: nn.Module) -> None:
    """Raise RuntimeError for a wrapper with more than one process."""
    names = {cls.__name__ for cls in type(module).__mro__}
    found = next((name for name in _WRAPPERS if name in names), None)
    if found is None:
        return
    group = getattr(module, "process_group", None)
    size = processes() if group is None else group.size()
    if size > 1:
        raise RuntimeError(
            f"model must not be wrapped in {found} over several processes where zeroth-order "
            f"parameters train, got {size} processes: each would estimate from its own batch, and "
            "end at a base model of its own. Train in one process on one device, and accumulate "
            "micro-batches by optimizer.backward(closure) where the batch is too large; or give "
            "HybridZOFO first-order groups only"
        )
