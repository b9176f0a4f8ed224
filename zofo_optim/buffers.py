"""Buffers of a model, such as batch norm's statistics: a step changes them once."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zofo_kernels.memory import has_memory

from .quantized import LearningScales, Scale, Scales, check_perturbation, named_as_scales

_ROOM = 1 << 28
"""Bytes that the first step copies at most; past that, the largest buffers go by their versions."""
_COPIED = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
)
"""Other dtypes cannot be compared everywhere; they hold packed weights, which no run changes."""


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups, and the model that they are of.

    Args:
        groups: see :class:`zofo_optim.HybridZOFO`.
        model: whose parameters.
        scales: those among them that are quantisation scales.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], model: nn.Module, scales: Iterable[Scale] = ()
    ) -> None:
        super().__init__(groups)
        self.model = model
        self.scales = LearningScales(scales)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self.scales:  # pickles hold none
            self.scales = _scales_of(self.model, self)


class Modules:
    """What an optimizer knows of its model's modules.

    A copy that is made along with the model's, and after it, knows the copied ones; any other
    knows none, so that it holds no second model. Pickles hold none, either.

    Args:
        model: that the parameters are of; None: unknown.
        buffered: the module whose buffers are restored; None: none are.
    """

    def __init__(self, model: nn.Module | None = None, buffered: nn.Module | None = None) -> None:
        self.model = model
        self.buffered = buffered

    def __deepcopy__(self, memo: dict[int, Any]) -> Modules:
        return Modules(memo.get(id(self.model)), memo.get(id(self.buffered)))

    def __reduce__(self) -> tuple[type[Modules], tuple[()]]:
        return Modules, ()


class _Content(NamedTuple):
    """What a module held by a name, and the elements then."""

    module: nn.Module
    name: str
    tensor: Tensor
    elements: Tensor

    def is_there(self) -> bool:
        now = getattr(self.module, self.name)
        return now is self.tensor and torch.equal(now, self.elements)

    def put_back(self) -> None:
        if getattr(self.module, self.name) is not self.tensor:  # replaced, not written
            setattr(self.module, self.name, self.tensor)
        self.tensor.copy_(self.elements)


def _can_be_copied(tensor: Tensor) -> bool:
    return tensor.dtype in _COPIED and not tensor.is_nested and has_memory(tensor)


def module_of(params: Any, restore_buffers: bool | nn.Module) -> nn.Module | None:
    """The module that an optimizer's argument ``restore_buffers`` speaks of.

    Raises:
        TypeError: it is neither a bool nor a module.
    """
    if isinstance(restore_buffers, nn.Module):
        return restore_buffers
    if not isinstance(restore_buffers, bool):
        kind = type(restore_buffers).__name__
        raise TypeError(f"restore_buffers must be a bool or a torch.nn.Module, got {kind}")
    return params.model if restore_buffers and isinstance(params, ParamGroups) else None


def model_of(params: Any, restore_buffers: bool | nn.Module) -> nn.Module | None:
    """The model that an optimizer's parameters are of; None: unknown."""
    return params.model if isinstance(params, ParamGroups) else module_of(params, restore_buffers)


def scales_among(
    params: Any, model: nn.Module | None, groups: Sequence[dict[str, Any]], perturbation: str
) -> LearningScales:
    """The quantisation scales in an optimizer's zeroth-order groups.

    Args:
        params: what it was given.
        model: see :func:`model_of`; none are known where it is unknown.
        groups: what it made of that.
        perturbation: the optimizer's.

    Raises:
        ValueError: there are some, as far as can be told, and they are not perturbed in place.
    """
    if isinstance(params, ParamGroups):
        found = LearningScales(params.scales)
    else:
        found = LearningScales() if model is None else _scales_of(model, groups)
    names = [scale.name for scale in found]
    if model is None:
        names = [name for group in _zeroth_order(groups) for name in named_as_scales(group)]
    check_perturbation(names, perturbation)
    return found


def _scales_of(model: nn.Module, groups: Sequence[dict[str, Any]]) -> LearningScales:
    found = LearningScales()
    if zeroth_order := _zeroth_order(groups):
        known = Scales(model)
        for group in zeroth_order:
            found += known.among(group["params"], group.get("param_names"))
    return found


def _zeroth_order(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group for group in groups if group["mode"] == "zo"]


class Buffers:
    """The buffers of a module that closures change, over the evaluations of one step after another.

    All evaluations of a step start from the same buffers, and leave those that the first one left.
    Which ones change is found in the first step, where all are copied; later a buffer that did not
    change costs a comparison of its version.

    Args:
        module: whose buffers; None for no buffers.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        modules = [] if module is None else list(module.modules())
        self._places = [
            (owner, name)
            for owner in modules
            for name, _ in owner.named_buffers(recurse=False, remove_duplicate=False)
        ]
        self._changing = set(range(len(self._places)))  # all, until a run shows which
        self._unknown = True
        self._versions: list[tuple[int, int]] = []
        self._before: dict[int, _Content] = {}
        self._after: dict[int, _Content] = {}

    def begin(self) -> None:
        """Before a step's first evaluation."""
        if not self._places:
            return
        self._after = {}
        self._before = self._contents()
        self._versions = self._now()

    def ran(self) -> None:
        """After the first evaluation: the others will start from, and leave, what is known now."""
        if not self._places:
            return
        pairs = enumerate(zip(self._versions, self._now(), strict=True))
        changed = {k for k, (then, now) in pairs if then != now}
        if self._unknown:  # writes to .data count no versions
            changed |= {k for k, content in self._before.items() if not content.is_there()}
            self._changing, self._unknown = changed, False
        self._changing |= changed
        # one that has never changed before could not be copied in time: others start from now
        self._after = self._contents()
        self._before = {k: self._before.get(k, content) for k, content in self._after.items()}

    def rewind(self) -> None:
        """Before any other evaluation: as they were before the first."""
        self._put_back(self._before)

    def end(self) -> None:
        """After the last: as they were after the first."""
        self._put_back(self._after)
        self._before, self._after = {}, {}

    @contextmanager
    def as_before(self) -> Generator[None, None, None]:
        """After the block they are as they were before it, however large."""
        before = self._contents(room=math.inf) if self._places else {}
        try:
            yield
        finally:
            self._put_back(before)

    def _put_back(self, contents: dict[int, _Content]) -> None:
        if contents:
            with torch.inference_mode():  # where torch may write all tensors
                for content in contents.values():
                    content.put_back()

    def _contents(self, room: float = _ROOM) -> dict[int, _Content]:
        """Of those that change, where they can be copied: not None, sparse, on meta, or packed."""
        tensors = {place: getattr(*self._places[place], None) for place in self._changing}
        here = {k: t for k, t in tensors.items() if t is not None and _can_be_copied(t)}
        found, used = {}, 0
        for place, tensor in sorted(here.items(), key=lambda item: item[1].nbytes):
            used += tensor.nbytes
            if self._unknown and used > room:
                break
            found[place] = _Content(*self._places[place], tensor, tensor.detach().clone())
        return found

    def _now(self) -> list[tuple[int, int]]:
        """Identity and version of each; those of inference mode count no versions."""
        found = []
        for module, name in self._places:
            t = getattr(module, name, None)
            found.append((id(t), 0 if t is None or t.is_inference() else t._version))
        return found
