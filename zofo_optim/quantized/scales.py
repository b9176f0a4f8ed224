"""The scales of a model's quantised weights, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..names import match_names
from .formats import Format, Scale, formats, memory_of


class _Place(NamedTuple):
    prefix: str
    module: nn.Module
    attribute: str
    parameter: Tensor
    format: Format


def _places(model: nn.Module) -> Iterator[_Place]:
    """Each quantised parameter whose scales can learn, by every name that it has."""
    known = formats()
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
            for format in known:
                if format.holds(module, p):
                    yield _Place(f"{name}." if name else "", module, attribute, p, format)
                    break


def prepare(model: nn.Module) -> dict[str, int]:
    """Make the scales of a model's quantised weights floats that training can move in place.

    What is quantised itself (double quantisation) or has 16 bits becomes fp32. Called again, it
    finds nothing to do.

    Returns:
        How many tensors were changed, by what was done.
    """
    done: Counter[str] = Counter()
    for place in _places(model):
        said = place.format.prepare(place.module, place.parameter)
        done.update([said] if said else [])
    return dict(done)


def _every_scale(model: nn.Module) -> Iterator[Scale]:
    """By every name; those of integers are left out."""
    for prefix, module, attribute, _, format in _places(model):
        for key, read in format.scales(module, attribute):
            tensor = read()
            if tensor is not None and tensor.is_floating_point():
                yield Scale(prefix + key, tensor, read, prefix + attribute)


class Scales:
    """Scales that a model's modules use, to be asked later whether they still do.

    Args:
        model: its scales are taken as they are now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._by_memory: dict[tuple[object, ...], list[Scale]] = {}
        for scale in _every_scale(model):
            self._by_memory.setdefault(memory_of(scale.tensor), []).append(scale)

    def __iter__(self) -> Iterator[list[Scale]]:
        """Each tensor once, with every name that it has."""
        return iter(self._by_memory.values())

    def __len__(self) -> int:
        return len(self._by_memory)

    @property
    def weights(self) -> set[str]:
        """Names of the parameters that they scale, all of each."""
        return {one.weight for every in self for one in every}

    def among(self, tensors: Iterable[Tensor]) -> list[Scale]:
        """Those that are in a list of tensors."""
        found = [self._by_memory.get(memory_of(t)) for t in tensors if not _is_parameter(t)]
        return [every[0] for every in found if every]


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def check_held(scales: Iterable[Scale]) -> None:
    """
    Raises:
        RuntimeError: a module uses another tensor than the one that learns.
    """
    lost = [scale.name for scale in scales if not _is_held(scale)]
    if lost:
        raise RuntimeError(
            f"model must still use the quantisation scales that learn, but has replaced {lost[0]!r}"
            + f" ({len(lost)} in all)" * (len(lost) > 1)
            + ": moving a model to a device or a dtype, loading and quantising it makes new ones. "
            "Do so before hybrid_param_groups, or make the groups and the optimizer anew"
        )


def _is_held(scale: Scale) -> bool:
    now = scale.read()
    if now is None or now is scale.tensor:
        return now is not None
    return memory_of(now) == memory_of(scale.tensor)


def check_perturbation(scales: Sequence[Scale], perturbation: str) -> None:
    """
    Raises:
        ValueError: scales learn, and are not perturbed in place.
    """
    if scales and perturbation != "in_place":
        raise ValueError(
            f"perturbation must be 'in_place' where quantisation scales learn, got "
            f"{perturbation!r}, which sees the arguments of torch calls: {scales[0].name!r} is "
            "read within its format's own"
        )


def named_tensors(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """What of a model can learn, by name: its parameters, then the scales of quantised weights.

    Args:
        model: any module.
        remove_duplicate: whether tied ones come once, by the first of their names.
    """
    yield from model.named_parameters(remove_duplicate=remove_duplicate)
    for every in Scales(model) if remove_duplicate else ():
        yield every[0].name, every[0].tensor
    for scale in () if remove_duplicate else _every_scale(model):
        yield scale.name, scale.tensor


class Names:
    """The names of a model's tensors that can learn: those of :func:`named_tensors`."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._scales = Scales(model)

    def of(self, tensor: Tensor) -> str | None:
        """None where the model does not hold it."""
        found = self._parameters.get(id(tensor))
        scales = self._scales.among([tensor]) if found is None else ()
        return scales[0].name if scales else found


def tensors_for(names: Iterable[str], model: nn.Module) -> dict[str, Tensor]:
    """What of a model can learn, by every name, to be filled with tensors of these names.

    Where parameters alone do not have all of the names, the model's scales are prepared first, as
    they were when they learnt.
    """
    names = list(names)
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if len(match_names(names, parameters)) == len(set(names)):
        return parameters
    prepare(model)
    return dict(named_tensors(model, remove_duplicate=False))
