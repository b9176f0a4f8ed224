"""What a format of quantised weights must tell, and which formats there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

Read = Callable[[], Tensor | None]
"""What a module holds now in a scale's place; a ``partial``, by which copies read their module."""


class Scale(NamedTuple):
    """A tensor of quantisation scales, or of zero points that are floats."""

    name: str
    """In the model: the format's own key in state dicts."""
    tensor: Tensor
    read: Read
    """The tensor that the module uses now; another one after the model was moved or replaced."""
    weight: str
    """Name of the parameter that it scales."""


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    """The same for tensors that hold the same elements in the same memory.

    Moving torchao's tensors to where they are makes new ones of the same memory.
    """
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class Format(Protocol):
    """A way to hold quantised weights, known by the parameter's type; one class a format.

    Its library need not be installed: where it is not, no module has such a parameter.
    """

    title: str
    """For messages."""
    keys: tuple[str, ...]
    """Last parts of the scales' names."""

    def holds(self, module: nn.Module, parameter: Tensor) -> bool:
        """Whether a module's parameter is quantised so, and its scales can learn."""

    def prepare(self, module: nn.Module, parameter: Tensor) -> str:
        """Make the scales floats that stay where they are; says what has changed, "" for nothing.

        What the module computes stays the same to the bit where nothing is said.
        """

    def code(self, parameter: Tensor) -> str:
        """What its integers stand for, where neither names nor dtypes tell; else ""."""

    def scales(self, module: nn.Module, attribute: str) -> Sequence[tuple[str, Read]]:
        """Of the parameter that the module has by this name: keys within the module's own."""


def is_of(tensor: object, package: str, *kinds: str) -> bool:
    """Whether a tensor's class has one of these names and comes from the package."""
    kind = type(tensor)
    return kind.__name__ in kinds and kind.__module__.split(".")[0] == package


def formats() -> tuple[Format, ...]:
    """Those whose scales can learn."""
    from .bnb_4bit import Bnb4bit
    from .bnb_8bit import Bnb8bit
    from .torchao_tensors import TorchaoTensors

    return (Bnb4bit(), Bnb8bit(), TorchaoTensors())
