"""Wrappers by which several processes share a model: those that zeroth order can train under."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from zofo_kernels._torch_compat import waited_for_by_ddp

_INSTEAD = {
    "FullyShardedDataParallel": "shard it by torch.distributed.fsdp.fully_shard",
    "DeepSpeedEngine": "wrap it in DistributedDataParallel, or shard it by fully_shard",
}
"""Names of the classes, as importing them takes seconds."""
_DDP = "DistributedDataParallel"

Wrapped = WeakSet[Any]
"""Models in DDP."""


def processes() -> int:
    """How many ``torch.distributed`` has."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def check_wrappers(model: nn.Module) -> None:
    """Refuse a model with a part that is wrapped in a way that zeroth order cannot train under.

    Raises:
        RuntimeError: names the wrapper, and what to take instead.
    """
    if processes() > 1:
        for module in model.modules():
            _refuse(module)


@contextmanager
def checked(size: int, zeroth_order: Collection[int] = ()) -> Generator[Wrapped, None, None]:
    """Refuse to call such a model inside the block, or one of more processes than an optimizer's.

    Args:
        size: number of processes of the optimizer.
        zeroth_order: ids of its zeroth-order parameters.

    Yields:
        The models in DDP that are called inside the block, as they are called.
    """
    wrapped: Wrapped = WeakSet()
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        yield wrapped
        return

    def before(module: nn.Module, args: Any) -> None:
        module = getattr(module, "_orig_mod", module)  # also within torch.compile
        _refuse(module)
        if _DDP in _names(module):
            _check_ddp(module, size, zeroth_order)
            wrapped.add(module)

    hook = register_module_forward_pre_hook(before)
    try:
        yield wrapped
    finally:
        hook.remove()


def _names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _size(module: nn.Module) -> int:
    group = getattr(module, "process_group", None)
    return processes() if group is None else int(group.size())


def _refuse(module: nn.Module) -> None:
    for name in _INSTEAD:
        if name in _names(module) and _size(module) > 1:
            raise RuntimeError(
                f"model must not be wrapped in {name} over several processes where zeroth-order "
                f"parameters train, got {_size(module)} processes: {_INSTEAD[name]}"
            )


def _check_ddp(module: nn.Module, size: int, zeroth_order: Collection[int]) -> None:
    if _size(module) > size:
        raise RuntimeError(
            f"process_group must be that of {_DDP} or a larger one, got {size} processes and "
            f"{_size(module)} of the wrapped model: each would estimate from its own batch, and "
            "end at a base model of its own"
        )
    trained = [p for p in module.parameters() if p.requires_grad and id(p) not in zeroth_order]
    if _size(module) > 1 and waited_for_by_ddp(module) > len(trained):
        raise RuntimeError(
            f"zeroth-order parameters must have requires_grad=False before {_DDP} wraps their "
            "model, or it waits for gradients that they never get: call model.requires_grad_(False)"
            " on them first"
        )
