"""Trained heads: what peft calls ``modules_to_save``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .activations import Tap
from .kinds import Fitted, Pair, State, module_of
from .layers import stack_of
from .projections import Offset
from .report import Carried

CHAIN = ("pre_classifier", "classifier")
"""What transformers calls two heads of which the second reads the first's outputs (DistilBERT)."""


class Head:
    """A trained head, one linear layer or a chain of them, on the large model's features.

    The first reads the large model's features through the map, W Q; one with a bias through an
    affine map, whose offset q adds W q to the bias. Units between two layers are no features of the
    models: they are kept one by one, and what the large head has more of is 0. The last keeps its
    outputs, the labels.

    Args:
        name: of the head in both models.
        trained: the small model's.
        large: the large model.
        then: more of the chain, names and modules, each of which reads what the one before writes.

    Raises:
        ValueError: it is no such chain, it is in a layer of the model, or its like in the large
            model has other labels or fewer units.
    """

    def __init__(
        self,
        name: str,
        trained: nn.Module,
        large: nn.Module,
        then: Sequence[tuple[str, nn.Module]] = (),
    ) -> None:
        parts = [(name, trained), *then]
        self.names = [part for part, _ in parts]
        self.name = name = ", ".join(self.names)
        own = [layer for part, module in parts for layer in _chain(part, module, large)]
        other = [layer for p, _ in parts for layer in _chain(p, module_of(large, p), large)]
        if [part for part, _ in own] != [part for part, _ in other]:
            raise ValueError(
                f"layer {name!r} cannot be mapped: it has the linear layers "
                f"{[part for part, _ in own]} in the small model and "
                f"{[part for part, _ in other]} in the large"
            )
        self._layers = [(part, a, b) for (part, a), (_, b) in zip(own, other, strict=True)]
        for place, (part, a, b) in enumerate(self._layers):
            last = place == len(self._layers) - 1
            fits = a.out_features == b.out_features if last else a.out_features <= b.out_features
            if not fits or (a.bias is None) != (b.bias is None):
                raise ValueError(
                    f"layer {part!r} cannot be mapped: its shape is "
                    f"{tuple(a.weight.shape)} in the small model and {tuple(b.weight.shape)} in "
                    f"the large, where a head needs {'as many outputs' if last else 'no fewer'}, "
                    "and a bias in both or none"
                )
        first_a, first_b = self._layers[0][1:]
        start = Tap(parts[0][0], "input")
        widths = (first_a.in_features, first_b.in_features)
        offset: Offset = "none" if first_a.bias is None else "affine"
        self.pair = Pair(start, start, widths, "small", offset)

    def carried(self, maps: Mapping[Pair, Fitted]) -> tuple[State, Carried]:
        """The head's tensors by their names in the large model."""
        through = maps[self.pair].map
        state: State = {}
        for place, (part, a, b) in enumerate(self._layers):
            weight = a.weight.detach().float().cpu()
            bias = None if a.bias is None else a.bias.detach().float().cpu()
            if place == 0:
                if bias is not None and through.offset is not None:
                    bias = bias + weight @ through.offset
                weight = weight @ through.matrix
            state[f"{part}.weight"] = _grown(weight, b.weight.shape)
            if bias is not None:
                state[f"{part}.bias"] = _grown(bias, b.bias.shape)
        return state, Carried("head", self.name, self.name, through.error)


def heads_of(base: nn.Module, adapter: str, large: nn.Module) -> list[Head]:
    """The heads of one of peft's adapters; ``base`` is the model within peft's.

    Raises:
        ValueError: see :func:`heads`.
    """
    return heads(
        {
            name: wrapper.modules_to_save[adapter]
            for name, wrapper in base.named_modules()
            if adapter in getattr(wrapper, "modules_to_save", ())
        },
        large,
    )


def heads(trained: Mapping[str, nn.Module], large: nn.Module) -> list[Head]:
    """The heads that a small model's trained modules are, by their names.

    Raises:
        ValueError: see :class:`Head`; or there are several that are no known chain: if one reads
            what another writes, its features are not the models'.
    """
    if not trained:
        return []
    first, *others = trained.items()
    if others and tuple(trained) != CHAIN:
        raise ValueError(
            f"layer {others[0][0]!r} cannot be mapped beside {first[0]!r}: several trained "
            f"modules, which may read one another's outputs, must be {' and '.join(CHAIN)}"
        )
    return [Head(*first, large, then=others)]


def _chain(name: str, head: nn.Module, large: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of a head by their names, in order; all its parameters are theirs."""
    if stack_of(large).split(name) is not None:
        raise ValueError(
            f"layer {name!r} cannot be mapped: a trained module must be outside of the "
            f"transformer's layers, {stack_of(large).name}, as a head is: adapt it instead"
        )
    found = [(part, m) for part, m in head.named_modules() if isinstance(m, nn.Linear)]
    owned = {id(p) for _, module in found for p in module.parameters()}
    others = [part for part, p in head.named_parameters() if id(p) not in owned]
    if others or not found:
        raise ValueError(
            f"layer {name!r} cannot be mapped: a trained module must be a chain of linear layers, "
            f"got {type(head).__name__} with {others or 'none'}"
        )
    return [(f"{name}.{part}" if part else name, module) for part, module in found]


def _grown(tensor: Tensor, shape: torch.Size) -> Tensor:
    grown = torch.zeros(shape)
    grown[tuple(slice(size) for size in tensor.shape)] = tensor
    return grown
