"""Norms, scales and biases along directions of the examples; shared ones are copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import Form

if TYPE_CHECKING:
    from .closed_forms import ClosedForms


def _scaled_and_shifted(forms: ClosedForms, x: Tensor, weight: Any, bias: Any) -> Tensor:
    """x weight + bias over the last dimension, in at least fp32."""
    y = forms.by_example(_wide(x), x.shape[-1], weight if forms.is_source(weight) else bias)
    if weight is not None:
        y = y * forms.vector(weight)
    if bias is not None:
        y = y + forms.vector(bias)
    return y.view(x.shape)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _layer_norm(
    forms: ClosedForms,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if not forms.per_example or len(normalized_shape) != 1 or forms.is_source(input):
        return None
    y = F.layer_norm(_wide(input), normalized_shape, None, None, eps)
    return _scaled_and_shifted(forms, y, weight, bias).to(input.dtype)


def _rms_norm(
    forms: ClosedForms,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor | None:
    if not forms.per_example or len(normalized_shape) != 1 or forms.is_source(input):
        return None
    y = F.rms_norm(_wide(input), normalized_shape, None, eps)
    return _scaled_and_shifted(forms, y, weight, None).to(input.dtype)


def _of_two(multiply: bool) -> Form:
    def form(forms: ClosedForms, input: Any, other: Any, **options: Any) -> Tensor | None:
        a, b = input, other
        if forms.is_source(a):
            a, b = b, a
        pair = isinstance(a, Tensor) and a.dim() > 1 and b.dim() == 1
        if not forms.per_example or options or not pair or forms.is_source(a):
            return None
        if a.shape[-1] != b.shape[0]:
            return None
        parts, vector = forms.by_example(a, b.shape[0], b), forms.vector(b)
        return (parts * vector if multiply else parts + vector).view(a.shape)

    return form


VECTORS: dict[Any, Form] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _of_two(True)),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _of_two(False)),
}
"""By the torch function that the mode sees."""
