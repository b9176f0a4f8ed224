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
from torch import Tensor

from zofo_kernels import matrix_of
from zofo_kernels._torch_compat import in_functorch, is_wrapper_subclass

from .low_rank import Displacement, Source
from .products import PRODUCTS, Form
from .vectors import VECTORS

_PLAIN = (Tensor, torch.nn.Parameter)


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
        self._matrices = {
            where: source
            for where, source in sources.items()
            if source.parameter.dim() != 3 and matrix_of(source.parameter.shape) is not None
        }
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
            if result.dtype != self.coarsest:
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
        """The source that ``value`` is, where it is a matrix, and no stack."""
        return self._matrices.get(id(value))

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


_FORMS: dict[Any, Form] = {**PRODUCTS, **VECTORS}
