"""Torch calls with perturbed copies of the parameters."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zofo_kernels import Shift, backend_for, perturbed
from zofo_kernels._torch_compat import in_functorch, without_functorch

from ..saved_copies import SavedCopies
from ..sharding import local_of
from .closed_forms import ClosedForms
from .low_rank import Source
from .stand_ins import distributed
from .transposes import Transposes, transposes


def _methods(*names: str) -> set[Any]:
    return {getattr(Tensor, name) for name in names if hasattr(Tensor, name)}


_METADATA = _methods(
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "stride",
    "storage_offset",
    "element_size",
    "is_contiguous",
    "is_floating_point",
    "is_complex",
    "is_inference",
    "is_shared",
    "is_pinned",
    "is_same_size",
    "get_device",
    "data_ptr",
    "untyped_storage",
    "requires_grad_",
    "register_hook",
    "new_empty",
    "new_zeros",
    "new_ones",
    "__hash__",
    "__len__",
    "has_names",
) | {
    torch.is_floating_point,
    torch.is_complex,
    torch.is_same_size,
    torch.numel,
    torch.empty_like,
    torch.zeros_like,
    torch.ones_like,
    torch.rand_like,
    torch.randn_like,
}
"""Calls that read no element."""
_CONTENT = {
    getattr(Tensor, name).__get__ for name in ("data", "T", "H", "mT", "mH", "real", "imag")
}
"""Attributes that hold elements; others are metadata."""
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_NUMBERS = (torch.int64, torch.int32, torch.int16)
_PARTS = _methods("__getitem__", "select", "narrow") | {torch.select, torch.narrow}
"""Calls that may take a part of a parameter, such as one expert of a stack."""
_ROW_COST = 4096
"""A row by itself costs the host as much as so many elements of a whole copy."""


def _takes(values: Iterable[Any], sources: Mapping[int, Source]) -> bool:
    """Whether a parameter is among a call's arguments, or in lists, tuples or dicts there."""
    for value in values:
        if id(value) in sources:
            return True
        kind = type(value)
        if kind is list or kind is tuple:
            if _takes(value, sources):
                return True
        elif kind is dict and _takes(value.values(), sources):
            return True
    return False


def _takes_one_part(index: Any) -> bool:
    """Whether indexing by this gives a view."""
    if type(index) is tuple:
        return all(map(_takes_one_part, index))
    if isinstance(index, Tensor):  # torch reads it as a number
        return type(index) is Tensor and index.dim() == 0 and index.dtype in _NUMBERS
    return index is Ellipsis or isinstance(index, slice) or type(index) is int


class Streaming:
    """Answers torch calls by their results with perturbed copies in place of parameters.

    A copy has its parameter's shape and strides. Calls without parameters pass at once.

    Args:
        sources: by ``id`` of the parameter.
        shifts: each group's displacement.
        backend: of ``zofo_kernels``.
        displaced: ids of parameters that are displaced already: copied as they are.
        forms: of calls that need no copy.
        saved: keeps copies out of graphs; None: no graph is made.
    """

    def __init__(
        self,
        sources: Mapping[int, Source],
        shifts: Sequence[Shift],
        backend: str,
        displaced: Collection[int] = (),
        forms: ClosedForms | None = None,
        saved: SavedCopies | None = None,
    ) -> None:
        self._forms, self._saved = forms, saved
        self._transposes = Transposes()
        self._sources = sources
        self._unchanged: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._shifts = shifts
        self._displaced = displaced
        devices = {source.device for source in sources.values()}
        self._backends = {device: backend_for(device, backend) for device in devices}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call's result; see :data:`zofo_optim.watch.Answer`."""
        sources, transposed = self._sources, self._transposes.sources
        of_transposed = bool(transposed) and _takes((*args, *kwargs.values()), transposed)
        if not (
            of_transposed or _takes(args, sources) or (kwargs and _takes(kwargs.values(), sources))
        ):
            return func(*args, **kwargs)
        if func in _METADATA:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__" and func not in _CONTENT:
            return func(*args, **kwargs)
        if of_transposed:
            product = self._transposes.product(func, args, kwargs)
            if product is not None:
                return self(*product, {})
        if name in ("__set__", "__delete__") and id(args[0]) in sources:
            if func == _SET_DATA:
                if self._is_unchanged(*args):
                    return None
                self._refuse(func, sources[id(args[0])])
            return func(*args, **kwargs)
        if self._forms is not None:
            if not (of_transposed or in_functorch()):
                result = self._closed_form(func, args, kwargs)
                if result is not None:
                    return result
            self._forms.refuse(func, self._transposes.undo((*args, *kwargs.values())))
        if func is F.embedding and self._few_rows(*args, **kwargs):
            return self._perturbed(sources[id(args[1])], rows=args[0])
        if func in _PARTS and args and id(args[0]) in sources:
            part = self._part(sources[id(args[0])], func, args[1:], kwargs)
            if part is not None:
                return part
        copies: dict[int, tuple[Tensor, int]] = {}
        result = func(
            *[self._replaced(value, copies) for value in args],
            **{key: self._replaced(value, copies) for key, value in kwargs.items()},
        )
        for where, (copy, version) in copies.items():
            if copy._version != version:
                self._refuse(func, sources.get(where) or transposed[where])
            if result is copy:
                self._unchanged[where] = weakref.ref(copy), version
        return result

    def _is_unchanged(self, parameter: Tensor, value: Any) -> bool:
        """Whether it is set to itself, as by a conversion of its module that converts nothing.

        Such as ``module.to(dtype)`` in a forward: the value is then the parameter's last copy, as a
        call returned it.
        """
        if id(parameter) not in self._unchanged:
            return False
        reference, version = self._unchanged[id(parameter)]
        copy = reference()
        return copy is not None and copy is value and copy._version == version

    def _closed_form(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        assert self._forms is not None
        source = self._forms.matrix(args[0]) if args else None
        if source is not None and transposes(func, args, kwargs):
            return self._transposes.of(source)
        return self._forms(func, args, kwargs)

    def _replaced(self, value: Any, copies: dict[int, tuple[Tensor, int]]) -> Any:
        where, transposed = id(value), self._transposes.sources
        if where in self._sources or where in transposed:
            if where not in copies:
                at = transposed.get(where)
                copy = self._copy(self._sources[where]) if at is None else self._copy(at).t()
                copies[where] = copy, copy._version
            return copies[where][0]
        kind = type(value)
        if kind is list or kind is tuple:
            return kind([self._replaced(item, copies) for item in value])
        if kind is dict:
            return {key: self._replaced(item, copies) for key, item in value.items()}
        return value

    def _part(
        self, source: Source, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """What the call takes, perturbed alone, where it is one run of the parameter's elements."""
        if func is Tensor.__getitem__ and not _takes_one_part(*args):
            return None
        if source.is_distributed or in_functorch() or not source.parameter.is_contiguous():
            return None
        part = func(source.content(), *args, **kwargs)
        return self._copy(source, part) if part.is_contiguous() else None

    def _copy(self, source: Source, part: Tensor | None = None) -> Tensor:
        """The perturbed parameter, or part, as a plain tensor, in whatever mode the closure is."""
        copy = self._made(source, part)
        if self._saved is not None and not source.is_distributed:
            self._saved.remember(copy, lambda: self._made(source, part))
        return copy

    def _made(self, source: Source, part: Tensor | None) -> Tensor:
        inference = torch.is_inference_mode_enabled()
        if not in_functorch() and not inference:
            return self._laid_out(source, part)
        # functorch would wrap new tensors, and those of inference mode do not count writes
        with (
            without_functorch(),
            torch.inference_mode(False) if inference else nullcontext(),
        ):
            return self._laid_out(source, part)

    def _laid_out(self, source: Source, part: Tensor | None) -> Tensor:
        if source.is_distributed:
            return self._distributed(source)
        content = wanted = source.content() if part is None else part
        if id(source.parameter) not in self._displaced:
            ready = None if self._forms is None or part is not None else self._forms.copy(source)
            content = self._perturbed(source, part) if ready is None else ready
            if content.stride() == wanted.stride():
                return content
        size, stride = wanted.size(), wanted.stride()
        copy = torch.empty_strided(size, stride, dtype=content.dtype, device=content.device)
        return copy.copy_(content)

    def _distributed(self, source: Source) -> Tensor:
        parameter, shift = source.parameter, self._shifts[source.group]
        if id(parameter) in self._displaced:
            return parameter.detach().clone()
        pieces = list(source.pieces(parameter, shift, self._backends[source.device]))
        local = torch.cat([piece.flatten() for piece in pieces]) if pieces[1:] else pieces[0]
        return distributed(local.view(local_of(parameter).shape), parameter)

    def _perturbed(
        self, source: Source, part: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        parameter, offset = source.content(), 0
        if part is not None:
            parameter, offset = part, int(part.storage_offset() - parameter.storage_offset())
        shift = self._shifts[source.group]
        return perturbed(
            parameter,
            shift.direction,
            shift.scale,
            index=source.noise_index,
            offset=offset,
            full_shape=source.parameter.shape,
            rows=rows,
            backend=self._backends[parameter.device],
        )

    def _few_rows(
        self,
        rows: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *unused: Any,
        **only_for_gradients: Any,
    ) -> bool:
        """Whether ``F.embedding`` of these arguments costs less than a copy of the weight."""
        return (
            type(rows) is Tensor
            and id(weight) in self._sources
            and id(weight) not in self._displaced
            and not self._sources[id(weight)].is_distributed
            and weight.device.type == rows.device.type == "cpu"  # the host reads the rows
            and weight.dim() == 2
            and rows.numel() * (weight.shape[1] + _ROW_COST) < weight.numel()
            and rows.dtype in (torch.int64, torch.int32)
            and max_norm is None  # else it writes to the weight
            and (padding_idx is None or -len(weight) <= padding_idx < len(weight))
            and not in_functorch()
        )

    def _refuse(self, func: Any, source: Source) -> None:
        raise RuntimeError(
            f"closure must not write to the zeroth-order parameter {source.name!r} (it called "
            f"{getattr(func, '__name__', func)}) where perturbation='streamed'"
        )


class _Uncompiled:
    """torch's switch is the process's: the first thread that comes sets it, the last one back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._stance = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._stance.__exit__(*error)


_UNCOMPILED = _Uncompiled()


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled functions run as they were written, by torch calls."""
    # where nothing is compiled, the import would take seconds
    return _UNCOMPILED if "torch._dynamo" in sys.modules else nullcontext()
