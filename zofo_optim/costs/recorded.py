"""What is known of one forward: its operations, their tensors, and the memory behind these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from zofo_kernels._torch_compat import TreeSpec


class Ref(int):
    """A tensor among an operation's arguments: its number."""


class Value(NamedTuple):
    """A tensor that the forward met, without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    storage: int


@dataclass
class Storage:
    """The memory behind one or more tensors."""

    nbytes: int
    outside: bool
    """Whether it was there before the forward: a parameter, a buffer, an input."""
    freed: int = -1
    """The first operation that begins without it; -1: it lives until the backward."""


class Op(NamedTuple):
    """One call of an operation."""

    func: Any
    leaves: list[Any]
    """Its arguments, flattened; tensors are :class:`Ref`."""
    spec: TreeSpec
    outputs: list[int | None]
    """Numbers of the tensors that it gave; None for what is none."""
    masks: dict[int, int]
    """For each tensor that autograd differentiates it by: the candidates that this depends on."""
    node: int
    """Sequence number of its node in the graph; -1: it has none."""
    flops: int
    """Of the forward."""


@dataclass
class Trace:
    """One forward."""

    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    leaves: dict[int, int] = field(default_factory=dict)
    """Tensors that gradients are for, and their bit; candidates are numbered by first use."""
    order: list[str] = field(default_factory=list)
    """Names of the candidates that the loss depends on, by first use in the forward."""
    bits: dict[str, int] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    always: int = 0
    """The bit of what requires gradients and is no candidate: an input, say."""
    saved: dict[int, list[int]] = field(default_factory=dict)
    """Storages that autograd saved, by the node's sequence number."""
    reached: frozenset[int] = frozenset()
    """Sequence numbers of the nodes that the loss's backward runs through."""
    loss: int = -1
    forward_flops: int = 0
