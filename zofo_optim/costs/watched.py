"""Watching the calls of torch that a closure makes while its costs are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zofo_kernels._torch_compat import (
    CPU_ATTENTION,
    cpu_attention_takes_groups,
    show_backward_to_modes,
)

_NO_GRAPH = (
    "closure must return a loss that depends on a tensor that may train, got one without a graph: "
    "it was detached, or computed under no_grad"
)


class LossWatch(TorchFunctionMode):
    """Leaves the closure's own calls of backward out, and keeps what they were for.

    On meta, where torch would take attention apart, it is the fused one of other devices; except
    in ``nn.MultiheadAttention``, which hides its call.

    Args:
        whole: runs what costs otherwise where fewer tensors train: attention with a mask that
            learns, such as T5's positions, which a CPU takes apart then.
    """

    def __init__(self, whole: Callable[..., Tensor]) -> None:
        super().__init__()
        self._whole = whole
        show_backward_to_modes()
        self._roots: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward or func is torch.autograd.backward:
            self._roots += _roots(*args, **kwargs)
            return None
        if func is torch.autograd.grad:
            raise ValueError(
                "closure must not take gradients by torch.autograd.grad, such as a gradient "
                "penalty's: what their backward costs is not counted"
            )
        if func is F.scaled_dot_product_attention:
            here = args[0] if args else kwargs["query"]
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if here.device.type in ("cpu", "meta") and mask is not None and mask.requires_grad:
                return self._whole(func, attention, args, kwargs)
            return attention(*args, **kwargs)
        return func(*args, **kwargs)

    def loss(self, returned: Any) -> Tensor:
        """The scalar whose backward a step would run.

        Raises:
            TypeError: a closure that returned no tensor has not called backward.
            ValueError: the loss is no scalar and no vector, or has no graph.
        """
        if isinstance(returned, Tensor) and returned.requires_grad:
            losses = [returned]
        elif self._roots:
            losses = self._roots
        elif isinstance(returned, Tensor):
            raise ValueError(_NO_GRAPH)
        else:
            raise TypeError(
                "closure must return the loss as a tensor, or call backward on it, for its costs "
                f"to be counted, got {type(returned).__name__}"
            )
        total = None
        for loss in losses:
            if loss.dim() > 1 and loss.numel() != 1:
                raise ValueError(
                    "closure must return a scalar loss, or losses of shape (B,), got shape "
                    f"{tuple(loss.shape)}"
                )
            if loss.is_complex():
                raise TypeError(f"closure must return a real loss, got dtype {loss.dtype}")
            if not loss.requires_grad:
                raise ValueError(_NO_GRAPH)
            scalar = loss.mean() if loss.numel() != 1 else loss
            total = scalar if total is None else total + scalar
        if total is None or total.grad_fn is None:
            raise ValueError(_NO_GRAPH)
        return total


def _roots(tensors: Any = (), *_: Any, **options: Any) -> list[Tensor]:
    tensors = options.get("self", tensors)
    found = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    return [t for t in found if isinstance(t, Tensor)]


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """Scaled dot-product attention, on meta as a CPU would compute it."""
    fused = _fused(*args, **kwargs)
    return F.scaled_dot_product_attention(*args, **kwargs) if fused is None else fused


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Attention on meta by the kernel that a CPU would take; None where that is none."""
    tensors = (query, key, value)
    if query.device.type != "meta" or dropout_p or any(t.dim() != 4 for t in tensors):
        return None
    if len({t.shape[-1] for t in tensors}) != 1 or any(t.stride(-1) != 1 for t in tensors):
        return None
    if query.shape[1] != key.shape[1] and not (enable_gqa and cpu_attention_takes_groups()):
        return None
    if attn_mask is not None and (attn_mask.requires_grad or attn_mask.dim() not in (2, 4)):
        return None
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        nothing = torch.zeros((), dtype=query.dtype, device="meta")
        attn_mask = torch.where(attn_mask, nothing, float("-inf"))
    attend = CPU_ATTENTION
    return attend(  # type: ignore[no-any-return]
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
