"""Passes over weights in a map, a few at a time, so that few of them are resident."""

from __future__ import annotations

from torch import Tensor

from zofo_kernels import Weights

from .maps import Pages, memory_of, pages_of

_PIECE = 1 << 25
"""Bytes of a weight that a pass has resident."""


def is_offloaded(tensor: Tensor) -> bool:
    """Whether :func:`zofo_optim.offload.offload_weights` has moved it away."""
    return memory_of(tensor) is not None


def drop(tensor: Tensor) -> None:
    """The pages of an offloaded tensor leave memory; others stay as they are."""
    pages = pages_of(tensor)
    if pages is not None:
        pages.drop()


def in_pieces(weights: Weights) -> Weights:
    """The same weights, whose offloaded pages a pass drops when it is done with them.

    One pass, so that an error is one of all of them: what a backend needs, it has before it writes.
    """
    offloaded = [pages_of(tensor) is not None for tensor in weights.tensors]
    if not any(offloaded):
        return weights
    pages: dict[int, Pages | None] = {}  # by id of the piece: found before anything is written

    def passed(piece: Tensor) -> None:
        if (found := pages[id(piece)]) is not None:
            found.drop()

    sizes = [
        _PIECE // tensor.itemsize if there else None
        for tensor, there in zip(weights.tensors, offloaded, strict=True)
    ]
    made = weights.cut(sizes, passed)
    pages.update((id(piece), pages_of(piece)) for piece in made.tensors)
    return made
