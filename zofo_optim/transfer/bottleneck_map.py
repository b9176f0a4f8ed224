"""Bottleneck adapters in the large model's bases, around the same inner units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .activations import Tap
from .bottleneck_files import put
from .bottleneck_targets import CHILD, output_width
from .bottlenecks import Bottleneck, adapters_of, saved_modules
from .heads import heads
from .kinds import Fitted, Pair, State, module_of
from .layers import counterparts, stack_of
from .projections import relative
from .report import Carried


class Bottlenecks:
    """See :class:`~zofo_optim.transfer.kinds.Kind`.

    The adapter sees its module's output h and has a bias, so h is told from the large model's by
    an affine map, h = Q H + q: the large one's down projection is D Q, with the bias D q + d.
    What it adds is written by P, which maps deviations of outputs: P U and P u. The inner units
    in between, which are not linear, are kept one by one.
    """

    every = False

    def __init__(
        self, small: Any, adapter: str, large: nn.Module, layers: Mapping[int, int]
    ) -> None:
        if hasattr(small, "peft_config"):
            raise ValueError(
                "small must have one adapter, got bottlenecks and one of peft around them: "
                "merge that (merge_and_unload)"
            )
        self._asked, self._small, self._large = dict(small.bottlenecks), small, large
        stacks = stack_of(small), stack_of(large)
        self._places: dict[str, tuple[str, Bottleneck]] = {
            other: (name, bottleneck)
            for name, bottleneck in adapters_of(small).items()
            for other in counterparts(name, stacks, layers)
        }
        if not self._places:
            raise ValueError(f"layers must map a layer with an adapter, got {dict(layers)}")
        saved = saved_modules(small, self._asked)
        self._heads = heads(saved, large)
        self._ends = {other: self._pairs(other) for other in self._places}
        self.pairs = [pair for ends in self._ends.values() for pair in ends]
        self.pairs += [head.pair for head in self._heads]

    def _pairs(self, other: str) -> tuple[Pair, Pair]:
        """Of what the adapter reads, and of what it writes: both are its module's output."""
        name, bottleneck = self._places[other]
        module = self._small.get_submodule(name)
        spanned = bottleneck.down.in_features <= getattr(module, "in_features", math.inf)
        theirs = output_width(self._large, other, module_of(self._large, other))
        ends = (Tap(name, "output"), Tap(other, "output"))
        widths = (bottleneck.down.in_features, theirs)
        reads = Pair(*ends, widths, "small", "affine", spanned)
        return reads, Pair(*ends, widths, "large", "centred", spanned)

    def carried(self, maps: Mapping[Pair, Fitted]) -> tuple[State, list[Carried]]:
        """See :class:`~zofo_optim.transfer.kinds.Kind`."""
        state: State = {}
        rows = []
        for other, (name, bottleneck) in self._places.items():
            reads, writes = (maps[pair] for pair in self._ends[other])
            own = {n: t.detach().float().cpu() for n, t in bottleneck.state_dict().items()}
            bias = own["down.bias"]
            if reads.map.offset is not None:
                bias = bias + own["down.weight"] @ reads.map.offset
            tensors = {
                "down.weight": own["down.weight"] @ reads.map.matrix,
                "down.bias": bias,
                "up.weight": writes.map.matrix @ own["up.weight"],
                "up.bias": writes.map.matrix @ own["up.bias"],
            }
            state.update({f"{other}.{CHILD}.{key}": t for key, t in tensors.items()})
            errors = (reads.map.error, writes.map.error, _change(bottleneck, reads))
            rows.append(Carried("bottleneck", name, other, *errors))
        for head in self._heads:
            more, row = head.carried(maps)
            state.update(more)
            rows.append(row)
        return state, rows

    def attach(self, state: State, scale: float) -> nn.Module:
        """See :class:`~zofo_optim.transfer.kinds.Kind`."""
        asked = {
            **self._asked,
            "target_modules": list(self._places),
            "modules_to_save": [name for head in self._heads for name in head.names],
            "scale": scale * self._asked["scale"],
        }
        put(self._large, asked, state, trainable=False, cast=True)
        return self._large


@torch.no_grad()
def _change(bottleneck: Bottleneck, reads: Fitted) -> float | None:
    """How far the adapter's change is off, of its input told from the large model's.

    Beside deviations from the mean: a constant, which biases carry, would hide the rest.
    """
    if reads.source is None or reads.target is None:
        return None
    device = bottleneck.down.weight.device

    def change(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(device)
        changed: torch.Tensor = bottleneck(rows) - rows
        return changed

    wanted = change(reads.target.held)
    mean = wanted.mean(0)
    return relative(change(reads.map(reads.source.held)) - mean, wanted - mean)
