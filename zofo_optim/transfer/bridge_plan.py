"""What a bridge changes in a model of its class, before it is known which parts are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from .bridge_config import Sizes, with_heads, with_layers, with_units
from .layers import Stack, stack_of
from .slicing import Cut, check_alike, cuts_between, on_meta, place_of, projections, side_of


class Plan(NamedTuple):
    """What is to be cut, before it is known which units and heads."""

    config: Any
    """Of as many layers as the large model has."""
    sizes: Sizes
    cuts: dict[str, Cut]
    """By name of the large model's tensors."""
    inputs: dict[str, dict[int, str]]
    """By part and layer, the linear layer that takes the part."""


def plan_of(twin: Any, stack: Stack, units: Any, heads: Any) -> Plan:
    """What fewer units and heads change in a model of the class.

    Raises:
        ValueError: naming the parameter that cannot be cut, and its shapes.
    """
    plan = Plan(twin.config, {}, {}, {})
    for asked, value, smaller in (("units", units, with_units), ("heads", heads, with_heads)):
        if value is None:
            continue
        small, sizes = smaller(twin.config, value)  # by itself: sizes of parts may be equal
        if not sizes:
            continue
        asked = f"{asked}={value!r}"
        other = on_meta(type(twin), small)
        cuts = cuts_between(twin, other, sizes, asked)
        check_alike(twin, other, asked)
        for name in cuts:
            if name in plan.cuts or stack.split(name) is None:
                raise ValueError(f"{asked}: {name} would be cut, which is not understood")
        inputs = {part: _by_layer(projections(twin, cuts, part), stack, asked) for part in sizes}
        plan = Plan(
            smaller(plan.config, value)[0],
            plan.sizes | sizes,
            plan.cuts | cuts,
            plan.inputs | {part: names for part, names in inputs.items() if names},
        )
    return plan


def _by_layer(names: Iterable[str], stack: Stack, asked: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for name in names:
        other = found.setdefault(within(name, stack)[0], name)
        if other != name:
            raise ValueError(f"{asked}: {other} and {name} both take inner units: only one can")
    return found


def within(name: str, stack: Stack) -> tuple[int, str]:
    """The number of the layer, and the name in it, of what is known to be in one."""
    place = stack.split(name)
    assert place is not None
    return place


def check_choice(twin: Any, stack: Stack, count: int) -> None:
    """That others than the first so many layers could be kept, before they are measured.

    Raises:
        ValueError: each layer computes something else one place before its own.
    """
    if count == stack.size:
        return
    after = range(1, count + 1)
    fewer = on_meta(type(twin), with_layers(twin.config, after, stack.size))
    errors = []
    for k in range(count):
        try:
            _check_layer(twin, fewer, stack, k + 1, k)
            return
        except ValueError as error:
            errors.append(error)
    raise ValueError(f"layers={count} leaves no choice, give indices: {errors[0]}")


def check_layers(twin: Any, stack: Stack, layers: Sequence[int]) -> None:
    """That the layers compute as before where others are left out."""
    fewer = on_meta(type(twin), with_layers(twin.config, layers, stack.size))
    if stack_of(fewer) != Stack(stack.name, len(layers)):
        raise ValueError(
            f"layers={list(layers)}: {type(twin.config).__name__} does not set their number by "
            "num_hidden_layers"
        )
    check_alike(twin, fewer, "layers", besides=stack.name)
    for k, layer in enumerate(layers):
        _check_layer(twin, fewer, stack, layer, k)


def _check_layer(twin: nn.Module, fewer: nn.Module, stack: Stack, layer: int, k: int) -> None:
    """That a layer is the same where it is the k-th."""
    ours, theirs = (
        model.get_submodule(stack.layer(index)) for model, index in ((twin, layer), (fewer, k))
    )
    check_alike(ours, theirs, f"layers: layer {layer}", (bool, int, float, str))
    if layer != k and getattr(twin.config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(  # transformers 4 does it as it runs
            f"layers: layer {layer}: attention is scaled by 1 / {layer + 1}, the layer's number, "
            f"which would be 1 / {k + 1} in the smaller model (scale_attn_by_inverse_layer_idx)"
        )


def sides_of(model: nn.Module, cuts: Mapping[str, Cut], stack: Stack) -> dict[str, dict[str, str]]:
    """By name within a layer, which part each side of a linear layer is that is cut."""
    sides: dict[str, dict[str, str]] = {}
    for name, cut in cuts.items():
        owner, last = place_of(model, name)
        inner = within(name, stack)[1].removesuffix(f".{last}")
        sides.setdefault(inner, {})[str(side_of(owner, last, cut.dim))] = cut.part
    return sides
