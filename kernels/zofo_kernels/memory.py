"""Where tensors lie in memory: whether it is there, and whether they share it."""

from __future__ import annotations

from torch import Tensor


def span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of its first byte and past its last one; ``tensor`` is not empty."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def check_storage(tensor: Tensor, name: str) -> None:
    """Raise ValueError where the memory behind a tensor is gone.

    A storage that is freed or resized moves, and so do its tensors' addresses: whoever keeps an
    address asks again where it has changed.
    """
    if tensor.numel() == 0:
        return
    start, end = span(tensor)
    needed = end - start + tensor.storage_offset() * tensor.element_size()
    present = tensor.untyped_storage().nbytes()
    if present < needed:
        raise ValueError(
            f"{name} must hold data, got a storage of {present} bytes where {needed} are needed "
            "(freed by untyped_storage().resize_(0)?): bring the weights back first"
        )
