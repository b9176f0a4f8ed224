"""Trained heads: what peft calls ``modules_to_save``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .activations import Tap
from .kinds import Fitted, Pair, State, module_of
from .report import Carried


class Head:
    """A trained head, one linear layer or a chain of them, on the large model's features.

    The first reads the large model's features through the map, W Q. Units between two layers are
    no features of the models: they are kept one by one, and what the large head has more of is 0.
    The last keeps its outputs, the labels.

    Args:
        name: of the head in both models.
        trained: the small model's.
        large: the large model.

    Raises:
        ValueError: it is no such chain, or its like in the large model has other labels or fewer
            units.
    """

    def __init__(self, name: str, trained: nn.Module, large: nn.Module) -> None:
        self.name = name
        own, other = _chain(name, trained), _chain(name, module_of(large, name))
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
                    f"layer {_joined(name, part)!r} cannot be mapped: its shape is "
                    f"{tuple(a.weight.shape)} in the small model and {tuple(b.weight.shape)} in "
                    f"the large, where a head needs {'as many outputs' if last else 'no fewer'}, "
                    "and a bias in both or none"
                )
        first_a, first_b = self._layers[0][1:]
        self.pair = Pair(
            Tap(name, "input"),
            Tap(name, "input"),
            (first_a.in_features, first_b.in_features),
            "small",
            "none",
        )

    def carried(self, maps: Mapping[Pair, Fitted]) -> tuple[State, Carried]:
        """The head's tensors by their names in the large model."""
        through = maps[self.pair].map
        state: State = {}
        for place, (part, a, b) in enumerate(self._layers):
            weight = a.weight.detach().float().cpu()
            if place == 0:
                weight = weight @ through.matrix
            state[_joined(self.name, part, "weight")] = _grown(weight, b.weight.shape)
            if a.bias is not None:
                bias = a.bias.detach().float().cpu()
                state[_joined(self.name, part, "bias")] = _grown(bias, b.bias.shape)
        return state, Carried("head", self.name, self.name, through.error)


def heads_of(base: nn.Module, adapter: str, large: nn.Module) -> list[Head]:
    """The heads of one of peft's adapters; ``base`` is the model within peft's."""
    return [
        Head(name, wrapper.modules_to_save[adapter], large)
        for name, wrapper in base.named_modules()
        if adapter in getattr(wrapper, "modules_to_save", ())
    ]


def _chain(name: str, head: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of a head, in order; all its parameters are theirs."""
    found = [(part, m) for part, m in head.named_modules() if isinstance(m, nn.Linear)]
    owned = {id(p) for _, module in found for p in module.parameters()}
    others = [part for part, p in head.named_parameters() if id(p) not in owned]
    if others or not found:
        raise ValueError(
            f"layer {name!r} cannot be mapped: a trained module must be a chain of linear layers, "
            f"got {type(head).__name__} with {others or 'none'}"
        )
    return found


def _grown(tensor: Tensor, shape: torch.Size) -> Tensor:
    grown = torch.zeros(shape)
    grown[tuple(slice(size) for size in tensor.shape)] = tensor
    return grown


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
