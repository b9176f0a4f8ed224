"""By what a journal knows its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..offload.in_turn import drop
from ..sharding import is_sharded, whole_of

_PIECE = 1 << 24  # elements copied to the host at a time


def fingerprint(tensor: Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of the elements' bytes in row-major order."""
    digest = hashlib.sha256()
    flat = tensor.detach().resolve_neg().reshape(-1)
    for low in range(0, flat.numel(), _PIECE):
        piece = flat[low : low + _PIECE]
        digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
        drop(piece)
    return digest.hexdigest()[:16]


def fingerprints(tensors: Iterable[Tensor], wanted: bool = True) -> list[str]:
    """:func:`fingerprint` of each, on several cores; of each as a whole, where some are sharded.

    Those are gathered, one at a time: all processes that hold shards call this.

    Args:
        tensors: whose.
        wanted: whether this process needs the result, or helps others; then it gets nothing.
    """
    tensors = list(tensors)
    if any(map(is_sharded, tensors)):
        wholes = map(whole_of, tensors)
        return [mark for whole in wholes for mark in ([fingerprint(whole)] if wanted else [])]
    if not wanted:
        return []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(fingerprint, tensors))
