"""Passes over weights in a map, a few at a time, so that few of them are resident."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from zofo_kernels import Weights

from .maps import pages_of

_PIECE = 1 << 25
"""Bytes of a weight that a pass has resident."""


def is_offloaded(tensor: Tensor) -> bool:
    """Whether :func:`zofo_optim.offload.offload_weights` has moved it to a file."""
    return pages_of(tensor) is not None


def drop(tensor: Tensor) -> None:
    """The pages of an offloaded tensor leave memory; others stay as they are."""
    pages = pages_of(tensor)
    if pages is not None:
        pages.drop()


def in_turn(weights: Weights) -> Iterator[Weights]:
    """The weights in parts, whose offloaded pages are dropped when the next one is asked for.

    Noise belongs to elements and not to calls, so a pass over the parts is the pass over all, to
    the bit. All are checked before the first part is out.
    """
    offloaded = [pages_of(tensor) is not None for tensor in weights.tensors]
    if not any(offloaded):
        yield weights
        return
    weights.layout()
    for position, one in enumerate(weights.singly()):
        (tensor,) = one.tensors
        if not offloaded[position]:
            yield one
            continue
        for part in weights.parts_of(position, _PIECE // tensor.itemsize):
            yield part
            drop(*part.tensors)
