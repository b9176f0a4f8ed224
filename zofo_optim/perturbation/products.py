"""Matrix products, embeddings and convolutions in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zofo_kernels._torch_compat import result_of_shape

from .low_rank import Source

if TYPE_CHECKING:
    from .closed_forms import ClosedForms

Form = Callable[..., "Tensor | None"]
"""Takes the function's arguments, after the :class:`ClosedForms`; None: it has no closed form."""


def _low_rank_part(
    x: Tensor, right: Tensor, left: Tensor, weight: Any, start: Tensor | None
) -> Tensor:
    """start + weight (x right^T) left: (S, N, d), (D, r, d), (D, r, m) -> (S, N, m)."""
    displacements, directions = x.shape[0], left.shape[0]
    x = _by_direction(x, right)
    t = _weighted(_coordinates(x, right), weight)
    if start is not None and directions == displacements:
        start = start.expand(displacements, 1, -1) if start.dim() == 3 else start
        return torch.baddbmm(start, t, left)
    y = t * left if _is_outer(x, left) else torch.bmm(t, left)
    y = y.view(displacements, -1, left.shape[2])
    return y if start is None else y + start


_FEW = 8
"""Rows of a direction for which multiplying by its elements costs less than a matrix product."""


def _is_outer(x: Tensor, factor: Tensor) -> bool:
    """Whether products with the factor are made of vectors: few rows, as in decoding, and rank 1.

    Not where autocast would have matrix products in another dtype.
    """
    return factor.shape[1] == 1 and x.shape[1] <= _FEW and _writes_freely(x)


def _coordinates(x: Tensor, factor: Tensor) -> Tensor:
    """x factor^T: (D, N, d), (D, r, d) -> (D, N, r)."""
    if x.dtype not in _WIDE and _is_outer(x, factor):
        t: Tensor = torch.linalg.vecdot(x, factor)
        return t.unsqueeze(-1)
    return torch.bmm(factor, x.transpose(1, 2)).transpose(1, 2)  # 2 to 4 times as fast as x first


def _by_direction(x: Tensor, factor: Tensor) -> Tensor:
    """(S, N, d) -> (D, rows of a direction, d)."""
    directions = factor.shape[0]
    return x if x.shape[0] == directions else x.reshape(directions, -1, x.shape[-1])


def _weighted(t: Tensor, weight: Any) -> Tensor:
    """Coordinates along directions, (D, rows, r), times each displacement's weight."""
    if isinstance(weight, Tensor) and t.shape[1] != weight.shape[1]:
        each = t.reshape(len(weight), weight.shape[1], -1, t.shape[2]) * weight.unsqueeze(2)
        return each.flatten(1, 2)
    return t * weight  # type: ignore[no-any-return]


def _times(
    forms: ClosedForms, x: Tensor, source: Source, bias: Tensor | None, *, transposed: bool
) -> Tensor:
    """x W^T + bias where ``transposed``, else x W + bias."""
    weight = source.parameter
    parts = forms.by_example(x, weight.shape[int(transposed)], weight)
    left, right, scale = forms.factors(source, x)
    if not transposed:
        left, right = right, left
    start = None if bias is None else forms.vector(bias)
    freely = x.dtype == weight.dtype and _writes_freely(x)
    if freely and x.dtype in _WIDE:
        y = F.linear(x, weight) if transposed else torch.matmul(x, weight)
        each = y.view(*parts.shape[:2], y.shape[-1])
        _add_low_rank_part_(each, parts, right, left, scale, start)
        return y
    weight = weight.detach()
    if transposed:
        weight = weight.t()
    y, flat = _flat(_low_rank_part(parts, right, left, scale, start)), _flat(x)
    y = torch.addmm(y, flat, weight, out=y) if freely else torch.addmm(y, flat, weight)
    return result_of_shape(y, (*x.shape[:-1], y.shape[1]))


_WIDE = (torch.float32, torch.float64)
"""Where a sum may round twice: the product comes first, and all else is added to it in place."""


def _writes_freely(x: Tensor) -> bool:
    """Whether results may be written to: no graph saves them, and no call casts them."""
    if torch.is_grad_enabled():
        return False
    return x.is_meta or not torch.is_autocast_enabled(x.device.type)  # meta has no autocast


def _flat(y: Tensor) -> Tensor:
    return y.reshape(-1, y.shape[-1])


def _add_low_rank_part_(
    y: Tensor, x: Tensor, right: Tensor, left: Tensor, weight: Any, start: Tensor | None
) -> None:
    """y += :func:`_low_rank_part`."""
    if start is not None:
        y += start
    y = _by_direction(y, left)
    alpha, t = 1.0, _coordinates(_by_direction(x, right), right)
    if isinstance(weight, Tensor):
        t = _weighted(t, weight)
    else:
        alpha = weight
    if _is_outer(y, left):
        y.addcmul_(t, left, value=alpha)
    elif y.shape[0] == 1:
        y[0].addmm_(t[0], left[0], alpha=alpha)
    else:
        y.baddbmm_(t, left, alpha=alpha)


def _times_row(
    forms: ClosedForms, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool
) -> Tensor | None:
    """The same for a weight of one row or column, whose direction is full; one an example."""
    if not forms.per_example or weight.dim() != 2:
        return None
    inside, outside = weight.shape[::-1] if transposed else weight.shape
    parts = forms.by_example(x, inside, weight)
    each = forms.vector(weight).view(-1, *weight.shape)
    y = torch.bmm(parts, each.transpose(1, 2) if transposed else each)
    if bias is not None:
        y = (y + forms.vector(bias)).to(y.dtype)
    return y.view(*x.shape[:-1], outside)


def _linear(
    forms: ClosedForms, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    source = forms.matrix(weight)
    if forms.is_source(input):
        return None
    if source is not None:
        return _times(forms, input, source, bias, transposed=True)
    if forms.is_source(weight):
        return _times_row(forms, input, weight, bias, transposed=True)
    if not forms.per_example or weight.dim() != 2:
        return None
    y = F.linear(input, weight)
    return y if bias is None else _plus_bias(forms, y, bias)


def _plus_bias(forms: ClosedForms, y: Tensor, bias: Tensor) -> Tensor:
    """Where the bias alone has a direction for each example."""
    return (forms.by_example(y, y.shape[-1], bias) + forms.vector(bias)).to(y.dtype).view(y.shape)


def _addmm(
    forms: ClosedForms,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: None = None,
) -> Tensor | None:
    source = forms.matrix(mat2)
    plain = beta == 1 and alpha == 1 and out is None and input.dim() == 1
    if not plain or forms.is_source(mat1):
        return None
    if source is not None:
        return _times(forms, mat1, source, input, transposed=False)
    if forms.is_source(mat2):
        return _times_row(forms, mat1, mat2, input, transposed=False)
    return _plus_bias(forms, torch.mm(mat1, mat2), input) if forms.per_example else None


def _matmul(forms: ClosedForms, input: Tensor, other: Tensor, *, out: None = None) -> Tensor | None:
    source = forms.matrix(other)
    if out is not None or other.dim() != 2 or input.dim() < 2 or forms.is_source(input):
        return None
    if source is None:
        return _times_row(forms, input, other, None, transposed=False)
    return _times(forms, input, source, None, transposed=False)


def _embedding(
    forms: ClosedForms,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *unused: Any,
    **only_for_gradients: Any,
) -> Tensor | None:
    source = forms.matrix(weight)
    if source is None or weight.dim() != 2 or max_norm is not None:  # which writes to the weight
        return None
    numbers = forms.by_example(input, 1, weight).squeeze(-1)  # (S, N)
    left, right, scale = forms.factors(source, weight)  # (D, r, rows), (D, r, n)
    y = F.embedding(input, weight.detach(), padding_idx)
    directions, rank = left.shape[:2]
    numbers = numbers.reshape(directions, 1, -1).expand(-1, rank, -1)
    t = _weighted(left.gather(2, numbers.long()).transpose(1, 2), scale)
    parts = y.view(directions, -1, y.shape[-1])
    parts = parts.addcmul_(t, right) if rank == 1 else parts.baddbmm_(t, right)
    return parts.view(y.shape)


def _convolution(conv: Any) -> Form:
    def form(
        forms: ClosedForms,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        source = forms.matrix(weight)
        if source is None or groups != 1 or forms.per_example or forms.is_source(input):
            return None
        left, right, scale = forms.factors(source, input)
        filters = right[0].view(right.shape[1], *weight.shape[1:])
        start = None if bias is None else forms.vector(bias)[0]
        y = conv(input, weight.detach(), start, stride, padding, dilation)
        t = conv(input, filters, None, stride, padding, dilation)
        outer = (left[0] * scale).t().view(weight.shape[0], -1, *[1] * (weight.dim() - 2))
        return y + conv(t, outer)  # type: ignore[no-any-return]

    return form


PRODUCTS: dict[Any, Form] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    Tensor.addmm: _addmm,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.embedding: _embedding,
    F.conv2d: _convolution(F.conv2d),
    F.conv3d: _convolution(F.conv3d),
}
"""By the torch function that the mode sees."""
