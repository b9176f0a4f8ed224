"""What torch functions give at W + left^T right, without that sum: W itself is read, never copied.

A linear map of x gives x W^T + (x right^T) left. The second part is made first, and the product
with W added to it: matrix products accumulate in fp32, so that in 16 bits the sum rounds once, as
a product with the displaced weight would.

With one displacement all rows of an input share it. With S of them an input has the same number of
rows for each, in order: an example, or some that are displaced alike. D directions may have two of
them each, one a side.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zofo_kernels import matrix_of
from zofo_kernels._torch_compat import in_functorch, is_wrapper_subclass

from .low_rank import Displacement, Source

_PLAIN = (Tensor, torch.nn.Parameter)
Form = Callable[..., "Tensor | None"]
"""A form takes the function's arguments, after the :class:`ClosedForms`; None: it has none."""


class NoOwner(RuntimeError):
    """What is computed with a parameter cannot be divided among the examples."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"the zeroth-order parameter {name!r} cannot have a direction for each example: {why}. "
            "Leave it out, by hybrid_param_groups(..., directions='per_example'), which knows most "
            "of these, and its exclude=..., or use directions='shared'"
        )


class ClosedForms:
    """Closed forms at one displacement, for the calls that have one.

    Args:
        sources: by ``id`` of the parameter.
        displaced: makes displacements, given their number.
        per_example: whether examples have their own.
        each: examples, one after the other, of a displacement.
        multiple: how many there are is one of this.
        examples: how many there are; None: as many as the first input leads with.
    """

    def __init__(
        self,
        sources: Mapping[int, Source],
        displaced: Callable[[int], Displacement],
        *,
        per_example: bool = False,
        each: int = 1,
        multiple: int = 1,
        examples: int | None = None,
    ) -> None:
        self._sources = sources
        self._displaced = displaced
        self._made: Displacement | None = None
        self.per_example = per_example
        self.examples = examples if per_example else 1
        self._each, self._multiple = each, multiple
        self.coarsest = torch.float64
        """Of the dtypes that forms have given."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The function's result, or None where it has no closed form.

        Raises:
            NoOwner: an input cannot be divided among the examples.
        """
        form = _FORMS.get(func)
        if form is None or not _takes(form, len(args), kwargs) or not _are_dense(args):
            return None
        result = form(self, *args, **kwargs)
        if result is not None:
            self.coarsest = max(self.coarsest, result.dtype, key=lambda d: torch.finfo(d).eps)
        return result

    @property
    def _at(self) -> Displacement:
        if self._made is None:
            assert self.examples is not None  # by_example comes first
            self._made = self._displaced(self.examples // self._each)
        return self._made

    def refuse(self, func: Any, args: Any) -> None:
        """Where each example has its own direction, a call without a closed form has no result.

        Raises:
            NoOwner: names the parameter.
        """
        if self.per_example:
            name = next((s.name for s in self._sources.values() if _holds(args, s)), "?")
            raise NoOwner(
                name, f"it is used by {_called(func)}, which has no closed form for examples"
            )

    def copy(self, source: Source) -> Tensor | None:
        """A displaced vector, where all examples share it; None for a matrix."""
        if self.per_example or id(source.parameter) not in self._sources:
            return None
        displaced = self._at.vector(source)
        return None if displaced is None else displaced[0].view(source.parameter.shape)

    # ---- what forms ask for ---------------------------------------------------------------------

    def matrix(self, value: Any) -> Source | None:
        """The source that ``value`` is, where it is a matrix."""
        source = self._sources.get(id(value))
        if source is None or value.dim() == 3 or matrix_of(value.shape) is None:
            return None
        return source

    def is_source(self, value: Any) -> bool:
        return id(value) in self._sources

    def factors(self, source: Source, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        """See :meth:`Displacement.factors`."""
        dtype = x.dtype if x.is_floating_point() else source.parameter.dtype
        return self._at.factors(source, dtype)

    def vector(self, value: Any) -> Tensor:
        """A bias or the like, as (S, 1, n) or (1, n), displaced where it is a source."""
        source = self._sources.get(id(value))
        if source is None:
            return value.view(1, -1)  # type: ignore[no-any-return]
        displaced = self._at.vector(source)
        if displaced is None:  # a matrix of that size: no bias of a linear map
            raise NoOwner(source.name, "it is added to an input, and is a matrix")
        return displaced.unsqueeze(1) if self.per_example else displaced

    def by_example(self, x: Tensor, width: int, what: Any) -> Tensor:
        """x as (S, rows of a displacement, width); S is 1 where the direction is shared."""
        rows = x.dim() > (width > 1)  # the features of one row, or a number, lead with nothing
        if self.examples is None and rows and x.shape[0] % self._multiple == 0:
            self.examples = max(x.shape[0], 1)
        if self.examples is None or (
            self.examples > 1 and not (rows and x.shape[0] % self.examples == 0)
        ):
            source = self._sources.get(id(what))
            raise NoOwner(
                "?" if source is None else source.name,
                f"its input has shape {tuple(x.shape)}, which is not led by the {self.examples} "
                "examples that the closure returned losses of, nor by their rows in order",
            )
        return x.reshape(self.examples // self._each, -1, width)


def _takes(form: Form, args: int, kwargs: dict[str, Any]) -> bool:
    """Whether the form knows the call's arguments: torch has names and overloads besides."""
    most, names = _signature(form)
    return args <= most and (not kwargs or names is None or kwargs.keys() <= names)


def _are_dense(args: tuple[Any, ...]) -> bool:
    """Not so: sparse and nested tensors, and those that wrap others, have products of their own."""
    return not any(
        isinstance(a, Tensor)
        and (
            a.layout != torch.strided
            or a.is_nested
            or (type(a) not in _PLAIN and is_wrapper_subclass(a))
        )
        for a in args
    )


@functools.cache
def _signature(form: Form) -> tuple[float, set[str] | None]:
    """How many positional arguments it takes, and which keywords; None: all."""
    _, *parameters = inspect.signature(form).parameters.values()
    kinds = {p.kind for p in parameters}
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    most = math.inf if inspect.Parameter.VAR_POSITIONAL in kinds else len(positional)
    names = None if inspect.Parameter.VAR_KEYWORD in kinds else {p.name for p in parameters}
    return most, names


def _called(func: Any) -> str:
    """What a user calls it: torch hands on attributes such as ``.T`` as their getters."""
    name = str(getattr(func, "__name__", func))
    if in_functorch():
        return f"{name} within torch.func"
    return f".{func.__self__.__name__}" if name == "__get__" else name


def _holds(values: Any, source: Source) -> bool:
    if isinstance(values, (list, tuple)):
        return any(_holds(value, source) for value in values)
    return values is source.parameter


def _low_rank_part(
    x: Tensor, right: Tensor, left: Tensor, weight: Any, start: Tensor | None
) -> Tensor:
    """start + weight (x right^T) left: (S, N, d), (D, r, d), (D, r, m) -> (S, N, m)."""
    t = _weighted(torch.bmm(_by_direction(x, right), right.transpose(1, 2)), weight)
    if start is None:
        return torch.bmm(t, left).view(*x.shape[:2], -1)
    if len(left) == len(x):
        start = start.expand(x.shape[0], 1, -1) if start.dim() == 3 else start
        return torch.baddbmm(start, t, left)
    return torch.bmm(t, left).view(*x.shape[:2], -1) + start


def _by_direction(x: Tensor, factor: Tensor) -> Tensor:
    """(S, N, d) -> (D, rows of a direction, d)."""
    return x if len(x) == len(factor) else x.reshape(len(factor), -1, x.shape[-1])


def _weighted(t: Tensor, weight: Any) -> Tensor:
    """Coordinates along directions, (D, rows, r), times each displacement's weight."""
    if isinstance(weight, Tensor):
        return (t.view(len(t), weight.shape[1], -1, t.shape[-1]) * weight).view(t.shape)
    return t * weight  # type: ignore[no-any-return]


def _times(
    forms: ClosedForms, x: Tensor, source: Source, bias: Tensor | None, *, transposed: bool
) -> Tensor:
    """x W^T + bias where ``transposed``, else x W + bias."""
    weight = source.parameter.detach()
    if transposed:
        weight = weight.t()
    parts = forms.by_example(x, weight.shape[0], source.parameter)
    left, right, scale = forms.factors(source, x)
    if not transposed:
        left, right = right, left
    start = None if bias is None else forms.vector(bias)
    flat = x.reshape(-1, weight.shape[0])
    if not (x.dtype == weight.dtype and _writes_freely(x)):
        y = torch.addmm(_flat(_low_rank_part(parts, right, left, scale, start)), flat, weight)
    elif x.dtype in _WIDE:
        y = torch.mm(flat, weight)
        _add_low_rank_part_(y.view(len(parts), -1, y.shape[1]), parts, right, left, scale, start)
    else:
        y = _flat(_low_rank_part(parts, right, left, scale, start))
        torch.addmm(y, flat, weight, out=y)
    return y.view(*x.shape[:-1], weight.shape[1])


_WIDE = (torch.float32, torch.float64)
"""Where a sum may round twice: the product comes first, and all else is added to it in place."""


def _writes_freely(x: Tensor) -> bool:
    """Whether results may be written to: no graph saves them, and no call casts them."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def _flat(y: Tensor) -> Tensor:
    return y.reshape(-1, y.shape[-1])


def _add_low_rank_part_(
    y: Tensor, x: Tensor, right: Tensor, left: Tensor, weight: Any, start: Tensor | None
) -> None:
    """y += :func:`_low_rank_part`."""
    if start is not None:
        y += start
    y = _by_direction(y, left)
    alpha, t = 1.0, torch.bmm(_by_direction(x, right), right.transpose(1, 2))
    if isinstance(weight, Tensor):
        t = _weighted(t, weight)
    else:
        alpha = weight
    if len(y) == 1:
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
    numbers = numbers.reshape(len(left), 1, -1).expand(-1, left.shape[1], -1)
    t = _weighted(left.gather(2, numbers.long()).transpose(1, 2), scale)
    parts = y.view(len(left), -1, y.shape[-1])
    if left.shape[1] == 1:
        return torch.addcmul(parts, t, right).view(y.shape)
    return torch.baddbmm(parts, t, right).view(y.shape)


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


# ---- vectors, one an example: shared ones are copied -------------------------------------------


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
        kind = torch.result_type(a, b)
        y = _scaled_and_shifted(forms, a, b if multiply else None, None if multiply else b)
        return y.to(kind)

    return form


_FORMS: dict[Any, Form] = {
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
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _of_two(True)),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _of_two(False)),
}
"""By the torch function that the mode sees."""
