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


def is_gone(tensor: Tensor) -> bool:
    """Whether the storage holds less than the tensor's elements.

    A storage that is freed or resized moves, and so do its tensors' addresses: whoever keeps an
    address asks again where it has changed.
    """
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() < _needed(tensor)


def _needed(tensor: Tensor) -> int:
    """Bytes of the storage up to the tensor's last element."""
    start, end = span(tensor)
    return end - start + tensor.storage_offset() * tensor.element_size()


def check_storage(tensor: Tensor, name: str) -> None:
    """Raise ValueError where the memory behind a tensor is gone."""
    if is_gone(tensor):
        raise ValueError(
            f"{name} must hold data, got a storage of {tensor.untyped_storage().nbytes()} bytes "
            f"where {_needed(tensor)} are needed (freed by untyped_storage().resize_(0)?): bring "
            "the weights back first"
        )
