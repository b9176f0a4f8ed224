"""What every kind of adapter says of itself, so that it can be carried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from .activations import Tap
from .projections import Offset, Projection, Rows
from .report import Carried

State = dict[str, Tensor]
"""An adapter's tensors by their names in the large model."""


@dataclass(frozen=True)
class Pair:
    """Two places, one in each model, between which a linear map is needed."""

    small: Tap
    large: Tap
    widths: tuple[int, int]
    """Of the small model's activation and of the large one's."""
    to: Literal["small", "large"]
    """Which is told from the other: what an adapter reads "small", what it writes "large"."""
    offset: Offset
    spanned: bool = True
    """Whether text can fill all directions of the small model's activation."""


class Fitted(NamedTuple):
    """A pair's map, and the rows that it was fitted on, where there are any."""

    map: Projection
    source: Rows | None = None
    target: Rows | None = None
    back: Projection | None = None
    """The other way, where the map is to the large model: what it loses, there and back."""


class Kind(Protocol):
    """An adapter of a small model, to be carried into a large one.

    Making one checks that it can be carried, as far as shapes and settings tell.
    """

    every: ClassVar[bool | None]
    """Whether each layer of the large model needs one; None: it is in no layer."""
    pairs: list[Pair]

    def carried(self, maps: Mapping[Pair, Fitted]) -> tuple[State, list[Carried]]:
        """The adapter's tensors in the large model, and the rows of the report."""

    def attach(self, state: State, scale: float) -> nn.Module:
        """Put the adapter, times a scale, into the large model: the only thing that changes it."""


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module of a large model that is the counterpart of a small one's.

    Raises:
        ValueError: there is none.
    """
    found: nn.Module | None = dict(model.named_modules()).get(name)
    if found is None:
        raise ValueError(
            f"large must have a module {name!r}, whose like has an adapter in the small model; got "
            f"a {type(model).__name__} without: both must be models of one family, of one class"
        )
    return found


def without_adapter(module: nn.Module) -> nn.Module:
    """The base model's layer within peft's."""
    outer: Any = module
    inner: nn.Module = outer.get_base_layer() if hasattr(outer, "get_base_layer") else outer
    return inner


def widths_of(name: str, module: nn.Module) -> tuple[int, int]:
    """Of a linear layer's or an embedding's input and output.

    Raises:
        ValueError: it is neither.
    """
    base: Any = without_adapter(module)
    for of_input, of_output in (("in_features", "out_features"), ("nx", "nf")):
        if hasattr(base, of_input) and hasattr(base, of_output):
            return int(getattr(base, of_input)), int(getattr(base, of_output))
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    raise ValueError(
        f"layer {name!r} cannot be mapped: it must be linear or an embedding, got "
        f"{type(base).__name__}"
    )
