"""Where what a layer writes can be seen in all its directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .activations import Tap
from .kept import bridge_of
from .kinds import widths_of, without_adapter
from .layers import Stack


class _Linear(NamedTuple):
    name: str
    inputs: int
    outputs: int

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


def seen_at(model: nn.Module, stack: Stack, name: str) -> Tap | None:
    """A place in a model whose activations show how units of a layer's output are to be mapped.

    A layer's outputs do, unless there are more of them than inputs, as they fill no more directions
    than the inputs do. Inner units of a feed-forward are seen after its non-linearity, which acts
    on each of them alone: where the layer that narrows again reads them. Of a gated feed-forward,
    down(act(gate) * up), that is a product: it shows the units of ``up``, but a unit whose ``up``
    and ``down`` have other signs has another product and the same gate. So the gate's are seen in
    what the activation puts out.

    Args:
        model: without peft's wrapper.
        stack: its layers.
        name: of a linear layer or an embedding.

    Returns:
        None: there is no such place, as for queries, keys and values that widen, which attention
        mixes.
    """
    inputs, outputs = widths_of(name, model.get_submodule(name))
    if outputs <= inputs or isinstance(without_adapter(model.get_submodule(name)), nn.Embedding):
        return Tap(name, "output")
    inside = stack.split(name)
    if inside is None or _attends(model, name):
        return None
    layer = stack.layer(inside[0])
    scope = name
    while scope != layer:  # BERT's reader is not beside the layer, but in the one that encloses it
        scope = scope.rpartition(".")[0]
        found = list(_linears(model.get_submodule(scope), scope))
        readers = [one for one in found if one.inputs == outputs > one.outputs]
        if readers:
            return _in_feed_forward(model, name, found, readers)
    return None


def _in_feed_forward(
    model: nn.Module, name: str, found: list[_Linear], readers: list[_Linear]
) -> Tap | None:
    """Beside the layers that write the units and the one that reads them there must be no others,
    as there are in attention."""
    reader, parents = readers[0], {name.rpartition(".")[0], readers[0].parent}
    beside = [one for one in found if one.parent in parents and one != reader]
    writers = [one.name for one in beside if one.outputs == reader.inputs > one.inputs]
    if len(readers) > 1 or len(beside) > len(writers) or _attends(model, reader.name):
        return None
    if len(writers) == 1 or bridge_of(getattr(model, "config", None)) is not None:
        return Tap(reader.name, "input")  # a bridge has the large model's own units
    gates = [one for one in writers if "gate" in one.rpartition(".")[2]]
    if len(writers) != 2 or len(gates) != 1:
        return None
    if name not in gates:
        return Tap(reader.name, "input")
    activations = [
        part
        for part, child in model.get_submodule(reader.parent).named_children()
        if not isinstance(child, nn.Dropout) and not any(True for _ in child.parameters())
    ]
    return Tap(f"{reader.parent}.{activations[0]}", "output") if len(activations) == 1 else None


def _attends(model: nn.Module, name: str) -> bool:
    parent = model.get_submodule(name.rpartition(".")[0])
    return "attention" in type(parent).__name__.lower()


def _linears(module: nn.Module, name: str) -> Iterator[_Linear]:
    """The linear layers in a module; what peft has put into them is no layer of its own."""
    for part, child in module.named_children():
        try:
            widths = widths_of(part, child)
        except ValueError:
            yield from _linears(child, f"{name}.{part}")
        else:
            if not isinstance(without_adapter(child), nn.Embedding):
                yield _Linear(f"{name}.{part}", *widths)
