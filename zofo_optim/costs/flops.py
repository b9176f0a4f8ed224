"""Floating-point operations, by torch's own registry of formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from zofo_kernels._torch_compat import (
    CPU_ATTENTION,
    CPU_ATTENTION_BACKWARD,
    GROUPED_PRODUCT,
)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(error: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    count = sdpa_backward_flop_count(error, query, key, value)  # type: ignore[no-untyped-call]
    return int(count)


def _of_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    def counted(*args: Any, **_: Any) -> int:
        return formula(*(a.shape for a in args if isinstance(a, torch.Tensor)))

    counted._get_raw = True  # type: ignore[attr-defined]  # so that FlopCounterMode passes tensors
    return counted


def _grouped(left: Any, right: Any, *_: Any, **__: Any) -> int:
    groups = left.shape[0] if left.dim() == right.dim() == 3 else 1
    return int(2 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1])


_grouped._get_raw = True  # type: ignore[attr-defined]
FURTHER: Mapping[Any, Callable[..., int]] = {
    CPU_ATTENTION: _of_shapes(_attention),
    CPU_ATTENTION_BACKWARD: _of_shapes(_attention_backward),
    GROUPED_PRODUCT: _grouped,
}
"""What the registry lacks: fused attention on the CPU, counted as it counts the one on a GPU, and
the grouped products of mixtures of experts.

Give it to ``FlopCounterMode(custom_mapping=...)`` for counts that can be compared."""


def flops_of(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> int:
    """Of one call of an operation; 0 for those without formula, which are vectors' and moves."""
    formula = _formula(func)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def _formula(func: Any) -> Callable[..., int] | None:
    packet = getattr(func, "_overloadpacket", func)
    return flop_registry.get(packet) or FURTHER.get(packet)
