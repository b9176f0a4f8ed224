"""Perturbation without writing: torch functions get perturbed copies of the parameters.

While a loss is evaluated at w + scale z, a torch-function mode sees every torch call and replaces
each zeroth-order parameter among its arguments by a fresh, perturbed copy. A copy lives as long as
the call needs it; the weights themselves are written by updates only, so they cannot drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zofo_kernels import Shift, perturb_, perturbed, uninterrupted

from .perturbation import Perturbation, ZOGroup


class Source(NamedTuple):
    """A parameter, its place in the noise, its name and the position of its group."""

    parameter: Tensor
    noise_index: int
    name: str
    group: int


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
    "get_device",
    "data_ptr",
    "untyped_storage",
    "requires_grad_",
    "register_hook",
    "__hash__",
    "__len__",
    "has_names",
) | {torch.is_floating_point, torch.is_complex, torch.is_same_size, torch.numel}
"""Calls that read no element."""
_CONTENT = {
    getattr(Tensor, name).__get__ for name in ("data", "T", "H", "mT", "mH", "real", "imag")
}
"""Attributes that hold elements; others are metadata."""
_IN_PLACE = {
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")),
    *(f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift")),
}


def _writes_first(func: Callable[..., Any]) -> bool:
    """Whether a torch function changes its first argument."""
    name = getattr(func, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


class Streaming(TorchFunctionMode):
    """Perturbed copies in place of parameters, for the torch calls made within.

    Args:
        sources: by ``id`` of the parameter.
        shifts: each group's displacement.
        backend: of ``zofo_kernels``.

    ``caught`` collects the ids of the parameters that some call took.
    """

    def __init__(
        self, sources: Mapping[int, Source], shifts: Sequence[Shift], backend: str
    ) -> None:
        super().__init__()
        self._sources = sources
        self._shifts = shifts
        self._backend = backend
        self.caught: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__" and func not in _CONTENT:
            return func(*args, **kwargs)
        sources = self._sources
        if args and id(args[0]) in sources and (name == "__set__" or _writes_first(func)):
            if name == "__set__" and func != Tensor.data.__set__:  # type: ignore[attr-defined]
                return func(*args, **kwargs)
            self._refuse(func, args[0])
        if "out" in kwargs and id(kwargs["out"]) in sources:
            self._refuse(func, kwargs["out"])
        copies: dict[int, Tensor] = {}
        args = tuple([self._replaced(a, copies) for a in args])
        if kwargs:
            kwargs = {key: self._replaced(a, copies) for key, a in kwargs.items()}
        return func(*args, **kwargs)

    def _replaced(self, value: Any, copies: dict[int, Tensor]) -> Any:
        source = self._sources.get(id(value))
        if source is not None:
            return self._copy(source, copies)
        if type(value) in (list, tuple):
            return type(value)([self._replaced(item, copies) for item in value])
        if type(value) is dict:
            return {key: self._replaced(item, copies) for key, item in value.items()}
        return value

    def _copy(self, source: Source, copies: dict[int, Tensor]) -> Tensor:
        where = id(source.parameter)
        if where not in copies:
            self.caught.add(where)
            direction, scale = self._shifts[source.group]
            copies[where] = perturbed(
                source.parameter, direction, scale, index=source.noise_index, backend=self._backend
            )
        return copies[where]

    def _refuse(self, func: Any, parameter: Any) -> None:
        name = self._sources[id(parameter)].name
        raise RuntimeError(
            f"closure must not write to the zeroth-order parameter {name!r} (it called "
            f"{getattr(func, '__name__', func)}) where perturbation='streamed'"
        )


class StreamedPerturbation(Perturbation):
    """Evaluations see perturbed copies of the weights, which are written by updates only."""

    def __init__(
        self,
        groups: Sequence[ZOGroup],
        distribution: str,
        backend: str,
        path: list[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(groups, distribution, backend, path)
        self._shifts: list[Shift] = []
        self._as_written: set[int] = set()
        self._sources = {
            id(parameter): Source(parameter, index, name, position)
            for position, group in enumerate(groups)
            for parameter, index, name in zip(group.params, group.indices, group.names, strict=True)
        }

    def move(self, sample: int, sign: int) -> None:
        self._shifts = [self._shift(group, sample, sign) for group in self.groups]

    def restore(self) -> None:
        self._shifts = []

    def evaluating(self) -> AbstractContextManager[Any]:
        if not self._shifts:
            return nullcontext()
        left = self._sources
        if self._as_written:
            left = {key: s for key, s in left.items() if key not in self._as_written}
        return Streaming(left, self._shifts, self._backend)

    # ---- verification -----------------------------------------------------------------------

    def verify(self, evaluate: Callable[[], Tensor], loss: Tensor) -> bool:
        """Compare with evaluations in which the weights themselves are perturbed, in parts.

        Parts are as large as the largest weight, whose content is kept aside: the weights are
        written, and then restored to the bit.

        Args:
            evaluate: evaluates the loss at the present point.
            loss: the loss there.

        Returns:
            False where the loss does not repeat, so that nothing can be said.

        Raises:
            RuntimeError: the loss depends on a weight in a way that torch functions do not see;
                names the parameters.
        """
        if not _same(evaluate(), loss):
            return False
        missed = [
            name
            for part in _parts(list(self._sources.values()))
            for name in self._unseen(part, evaluate, loss)
        ]
        if missed:
            raise RuntimeError(
                "closure must use zeroth-order parameters through torch functions where "
                "perturbation='streamed', but these reach the loss in another way (an extension, "
                "a raw pointer, a view made earlier): "
                + ", ".join(missed)
                + "; use perturbation='in_place'"
            )
        return True

    def _unseen(
        self, part: list[Source], evaluate: Callable[[], Tensor], loss: Tensor
    ) -> list[str]:
        """Names of the parameters in ``part`` that streaming does not perturb everywhere."""
        with self._written(part):
            same = _same(evaluate(), loss)
        if same:
            return []
        if len(part) == 1:
            return [part[0].name]
        half = len(part) // 2
        found = [
            name
            for some in (part[:half], part[half:])
            for name in self._unseen(some, evaluate, loss)
        ]
        return found or [source.name for source in part]

    @contextmanager
    def _written(self, part: list[Source]) -> Iterator[None]:
        """These weights are perturbed in place, and not streamed; then restored to the bit."""
        with torch.no_grad():
            kept = [source.parameter.detach().clone() for source in part]
            self._as_written = {id(source.parameter) for source in part}
            try:
                for source in part:
                    direction, scale = self._shifts[source.group]
                    perturb_(
                        [source.parameter],
                        direction,
                        scale,
                        indices=[source.noise_index],
                        backend=self._backend,
                    )
                yield
            finally:
                with uninterrupted():
                    for source, content in zip(part, kept, strict=True):
                        source.parameter.detach().copy_(content)
                    self._as_written = set()


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a, b) or (a.isnan() & b.isnan()).all())


def _parts(sources: list[Source]) -> Iterator[list[Source]]:
    """Runs of parameters of together at most the largest one's bytes."""
    sizes = [s.parameter.numel() * s.parameter.element_size() for s in sources]
    room = max(sizes, default=0)
    part: list[Source] = []
    used = 0
    for source, size in zip(sources, sizes, strict=True):
        if part and used + size > room:
            yield part
            part, used = [], 0
        part.append(source)
        used += size
    if part:
        yield part
