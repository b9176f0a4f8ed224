"""The scales of a model's quantised weights, by name."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..names import match_names
from .bnb_4bit import settle_layer
from .formats import Format, Read, Scale, formats, memory_of


class _Place(NamedTuple):
    prefix: str
    module: nn.Module
    attribute: str
    parameter: Tensor
    format: Format

    @property
    def weight(self) -> str:
        return self.prefix + self.attribute

    def scales(self) -> Iterator[tuple[str, Read]]:
        """What could learn, by its name in the model."""
        for key, read in self.format.scales(self.module, self.attribute):
            yield self.prefix + key, read


def _places(model: nn.Module) -> Iterator[_Place]:
    """Each quantised parameter whose scales can learn, by every name that it has."""
    known = formats()
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
            for format in known:
                if format.holds(module, p):
                    yield _Place(f"{name}." if name else "", module, attribute, p, format)
                    break


def scaled_weights(model: nn.Module) -> set[str]:
    """Names of the quantised parameters whose scales can learn, all of each."""
    return {place.weight for place in _places(model)}


def codes(model: nn.Module) -> dict[str, str]:
    """What the integers beside scales stand for, by names of scales: of formats with several."""
    return {
        name: code
        for place in _places(model)
        if (code := place.format.code(place.parameter))
        for name, _ in place.scales()
    }


def prepare(
    model: nn.Module,
    learns: Callable[[Sequence[str], Sequence[str]], bool] = lambda names, weights: True,
) -> dict[str, int]:
    """Make scales of a model's quantised weights floats that training can move in place.

    What is quantised itself (double quantisation) becomes fp32, and so does what has 16 bits where
    the format takes fp32. Called again, it finds nothing to do.

    Args:
        model: whose scales.
        learns: told all names of one of a weight's scales, and those of the weight. Weights of
            which none learns stay as they are.

    Returns:
        How many tensors were changed, by what was done.
    """
    weights: dict[int, list[_Place]] = {}
    for place in _places(model):
        weights.setdefault(id(place.parameter), []).append(place)
    done: Counter[str] = Counter()
    for places in weights.values():
        of_weight = [place.weight for place in places]
        of_scales = zip(*(place.scales() for place in places), strict=True)
        learn = [learns([name for name, _ in one], of_weight) for one in of_scales]
        if any(learn):
            said = [place.format.prepare(place.module, place.parameter) for place in places]
            done.update(filter(None, said))
    return dict(done)


def _every_scale(model: nn.Module) -> Iterator[Scale]:
    """By every name; those of integers are left out."""
    for place in _places(model):
        for name, read in place.scales():
            tensor = read()
            if tensor is not None and tensor.is_floating_point():
                yield Scale(name, tensor, read, place.weight)


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

    def among(
        self, tensors: Iterable[Tensor], names: Iterable[str] | None = None
    ) -> LearningScales:
        """Those that are in a list of tensors, with the list's own objects.

        Args:
            tensors: which may be anything.
            names: of the tensors: one that has a scale's name was that scale, and has been
                replaced in the model; it counts too, for :func:`check_held` to find.

        Returns:
            Tied ones by each of their names.
        """
        found = LearningScales()
        by_name = {one.name: one for every in self for one in every}
        tensors = list(tensors)
        for tensor, name in zip(tensors, names or [""] * len(tensors), strict=True):
            if isinstance(tensor, nn.Parameter) or not by_name:
                continue
            every = [*self._by_memory.get(memory_of(tensor), ())]
            if name in by_name and all(one.name != name for one in every):
                every.append(by_name[name])
            found += [scale._replace(tensor=tensor) for scale in every]
        return found


class LearningScales(list[Scale]):
    """The scales that an optimizer trains, and the modules that use them.

    A copy made along with the model's, in either order, is of the scales that the copied modules
    use, also where these copy them apart (bitsandbytes' 4-bit weights do). Pickles hold none of it,
    since they would hold the modules.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> LearningScales:
        found = LearningScales()
        for scale in self:
            read, held = copy.deepcopy(scale.read, memo), _is_held(scale)
            now = read() if held else None
            if now is not None:
                memo[id(scale.tensor)] = now  # in groups, which are copied after
            tensor = copy.deepcopy(scale.tensor, memo)
            found.append(scale._replace(tensor=tensor, read=read))
        return found

    def __reduce__(self) -> tuple[type[LearningScales], tuple[()]]:
        return LearningScales, ()


def check_held(scales: Sequence[Scale], learning: Iterable[Tensor]) -> None:
    """
    Args:
        scales: with the modules that should use them.
        learning: what an optimizer trains; other scales may be replaced.

    Raises:
        RuntimeError: a module uses another tensor than the one that learns.
    """
    if not scales:
        return
    ours = {id(tensor) for tensor in learning}
    lost = [scale.name for scale in scales if id(scale.tensor) in ours and not _is_held(scale)]
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


def named_as_scales(group: Mapping[str, Any]) -> list[str]:
    """Names in a group that are scales by all that the group tells, where no model does."""
    keys = {key for format in formats() for key in format.keys}
    pairs = zip(group.get("param_names", ()), group["params"], strict=False)
    return [
        name
        for name, tensor in pairs
        if "unit" in group and not isinstance(tensor, nn.Parameter)
        if name.rpartition(".")[2] in keys
    ]


def check_perturbation(names: Sequence[str], perturbation: str) -> None:
    """
    Args:
        names: of the scales that learn.
        perturbation: the optimizer's.

    Raises:
        ValueError: scales learn, and are not perturbed in place.
    """
    if names and perturbation != "in_place":
        raise ValueError(
            f"perturbation must be 'in_place' where quantisation scales learn, got "
            f"{perturbation!r}, which sees the arguments of torch calls: {names[0]!r} is "
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

    Layers are settled first, and where parameters alone do not have all of the names, the scales
    that have one are prepared, as they were when they learnt.
    """
    names = list(names)
    for module in model.modules():
        settle_layer(module)
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if len(match_names(names, parameters)) == len(set(names)):
        return parameters
    could = [name for place in _places(model) for name, _ in place.scales()]
    learnt = set(match_names(names, [*parameters, *could]).values())
    prepare(model, lambda names, _: not learnt.isdisjoint(names))
    return dict(named_tensors(model, remove_duplicate=False))
