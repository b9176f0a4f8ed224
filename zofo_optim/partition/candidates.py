"""Which of a model's tensors may train first-order, and what else of it trains now."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..zeroth_order import ZerothOrder, parameters_with_all_names

if TYPE_CHECKING:
    from .partition import Row


class Candidates(NamedTuple):
    """By name, each parameter once."""

    tensors: dict[str, Tensor]
    """What may train first-order."""
    excluded: dict[str, Tensor]
    """What could, were it not excluded."""
    others: dict[str, Tensor]
    """What requires gradients, and is neither: zeroth-order, as what is frozen."""


class _Left(NamedTuple):
    candidate: bool
    required: bool


_LEFT: MutableMapping[Tensor, _Left] = WeakTensorKeyDictionary()
"""By parameter of a partitioned model: whether it is a candidate, and required gradients then."""


def remember(rows: Mapping[int, Row], parameters: Iterable[Tensor]) -> None:
    """Keep what the candidates of a partition are, which ``requires_grad`` says no more.

    Args:
        rows: by identity of the parameters.
        parameters: that a partition has set ``requires_grad`` of, or has left as they are.
    """
    for p in parameters:
        row = rows.get(id(p))
        _LEFT[p] = _Left(row is not None and row.candidate, p.requires_grad)


def _remembered(every: Sequence[tuple[list[str], Tensor]]) -> list[tuple[list[str], Tensor]]:
    """The candidates of the model's last partition, unless ``requires_grad`` was set since."""
    found = []
    for names, p in every:
        left = _LEFT.get(p, _Left(candidate=False, required=False))
        if left.required != p.requires_grad:
            return []
        if left.candidate:
            found.append((names, p))
    return found


def candidates_in(
    model: nn.Module, rules: ZerothOrder, wanted: Collection[str] | None
) -> Candidates:
    """The candidates: those wanted; or of the last partition; or what trains; or all.

    Args:
        model: whose parameters.
        rules: what ``exclude`` says.
        wanted: names; None: those of the model's last partition, where ``requires_grad`` is as that
            has left it; else parameters with ``requires_grad=True``, or all where none has.

    Raises:
        TypeError: ``wanted`` is a string.
        ValueError: ``wanted`` has a name that no parameter has that can train.
    """
    if isinstance(wanted, str):
        raise TypeError(f"candidates must be a collection of names, got the string {wanted!r}")
    whole = parameters_with_all_names(model)
    every = [(names, p) for names, p in whole if p.is_floating_point()]
    if wanted is None:
        found = _remembered(whole) or [(names, p) for names, p in every if p.requires_grad]
        found = found or [(names, p) for names, p in every if not rules.is_unreached(names)]
    else:
        given = set(wanted)
        found = [(names, p) for names, p in every if given.intersection(names)]
        if unknown := given.difference(*(names for names, _ in found)):
            raise ValueError(
                "candidates must be names of parameters of floating point, got "
                f"{sorted(unknown)[0]!r}"
            )
    excluded = {names[0]: p for names, p in found if rules.excludes(names)}
    tensors = {names[0]: p for names, p in found if names[0] not in excluded}
    known = {names[0] for names, _ in found}
    others = {names[0]: p for names, p in whole if p.requires_grad and names[0] not in known}
    return Candidates(tensors, excluded, others)


def reasons_against(
    model: nn.Module,
    rules: ZerothOrder,
    tensors: Collection[str],
    reached: Collection[str] = (),
) -> dict[str, str]:
    """Why some of these tensors may not be zeroth-order, by name.

    An adapter that requires gradients is an active one, so that it may be, whatever the closure's
    batch reaches.

    Args:
        model: whose tensors.
        rules: see there.
        tensors: names.
        reached: names of those that the loss depends on.

    Raises:
        ValueError: one could learn, is not excluded, and cannot be moved.
    """
    found = {}
    of_adapters = adapters(model)
    for names, p in parameters_with_all_names(model):
        if names[0] not in tensors:
            continue
        if names[0] in reached or (p.requires_grad and of_adapters.intersection(names)):
            rules.reach(names)
        if reason := rules.reason_against(names, p):
            found[names[0]] = reason
    return found


def adapters(model: nn.Module) -> set[str]:
    """Names of the tensors that peft added, known by its modules' own attributes."""
    found: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        for child in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, child, None)
            start = f"{prefix}.{child}" if prefix else child
            if isinstance(part, nn.Parameter):
                found.add(start)
            elif isinstance(part, nn.Module | nn.ParameterDict):
                inside = part.named_parameters(remove_duplicate=False)
                found.update(f"{start}.{name}" for name, _ in inside)
        if "prompt_encoder" in dict(module.named_children()) and hasattr(module, "peft_config"):
            start = f"{prefix}.prompt_encoder" if prefix else "prompt_encoder"
            inside = module.prompt_encoder.named_parameters()  # type: ignore[union-attr]
            found.update(f"{start}.{name}" for name, _ in inside)
    return found
