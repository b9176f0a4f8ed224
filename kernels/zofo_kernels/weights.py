"""Lists of weights: checked, and laid out for the backends, once for many passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ._torch_compat import has_internal_overlap, increment_versions, is_wrapper_subclass
from .table import Slot, Slots

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_weight(tensor: Tensor, name: str = "tensor") -> None:
    """Raise TypeError or ValueError where a tensor cannot be perturbed in place.

    Raises:
        TypeError: not a dense tensor of a floating dtype that the kernels know.
        ValueError: a meta tensor, or one whose elements share memory (an expanded tensor).
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(
            f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, which cannot be "
            f"perturbed (quantised, complex and integer weights have no direction to move in); "
            f"it must be one of {known}"
        )
    wrapper = is_wrapper_subclass(tensor)
    if wrapper or tensor.layout != torch.strided:
        kind = type(tensor).__name__ if wrapper else tensor.layout
        raise TypeError(
            f"{name} is a {kind}, not a dense tensor: quantised, sharded and sparse weights "
            "cannot be perturbed in place"
        )
    if tensor.is_meta:
        raise ValueError(f"{name} must hold data, got a tensor on the meta device")
    if not tensor.is_contiguous() and has_internal_overlap(tensor):
        raise ValueError(f"{name} must not share memory among its elements (expanded tensor)")


def _check_list(
    name: str, values: Sequence[int] | None, default: list[int], limit: int
) -> list[int]:
    if values is None:
        return default
    if len(values) != len(default):
        raise ValueError(f"{name} must have one entry a tensor ({len(default)}), got {len(values)}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must hold ints, got {value!r}")
        if not 0 <= value < limit:
            raise ValueError(f"{name} must be in [0, {limit}), got {value}")
    return list(values)


def check_places(
    indices: Sequence[int] | None, offsets: Sequence[int] | None, sizes: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Indices and offsets of tensors of these sizes, with their defaults; see :class:`Weights`."""
    indices = _check_list("indices", indices, list(range(len(sizes))), 1 << 32)
    offsets = _check_list("offsets", offsets, [0] * len(sizes), 1 << 63)
    for offset, size in zip(offsets, sizes, strict=True):
        if offset + size > 1 << 63:
            raise ValueError(
                f"offsets must leave room for the tensor's elements below 2**63, got {offset} "
                f"for {size} elements"
            )
    return indices, offsets


class Weights:
    """A list of tensors to perturb and update many times, with their places in the noise.

    Checks and tables of addresses are made when first needed, and again where a tensor's storage
    has moved or its dtype or layout has changed since: passes then cost the host little. The
    operations take one in place of a list of tensors.

    Args:
        tensors: the weights, any strides, dtypes and devices; empty ones are skipped.
        indices: of each tensor's parameter among the zeroth-order parameters, in [0, 2**32);
            default 0, 1, ...
        offsets: index of each tensor's first element in the full parameter, in [0, 2**63);
            default 0.

    Raises:
        TypeError, ValueError: tensors (when first used), indices or offsets that cannot be.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        indices: Sequence[int] | None = None,
        offsets: Sequence[int] | None = None,
    ) -> None:
        if isinstance(tensors, Tensor):
            raise TypeError("tensors must be a sequence of tensors, got one tensor; pass [tensor]")
        self.tensors = list(tensors)
        sizes = [t.numel() if isinstance(t, Tensor) else 0 for t in self.tensors]
        self.indices, self.offsets = check_places(indices, offsets, sizes)
        self._seen: list[tuple[object, ...]] | None = None
        self._slots: dict[torch.device, Slots] = {}

    @contextmanager
    def slots(self) -> Iterator[dict[torch.device, Slots]]:
        """Contiguous slots by device; copies stand for tensors that are not contiguous, and are
        written back at the end."""
        now = None if self._seen is None else self._signature()
        if now is not None and now == self._seen:
            yield self._slots
            return
        self._seen = None
        slots, copies = self._lay_out()
        if not copies:  # copies would not follow their tensors
            self._slots, self._seen = slots, self._signature()
        yield slots
        for tensor, dense in copies:
            tensor.copy_(dense)

    def _signature(self) -> list[tuple[object, ...]]:
        """What must not change for addresses to hold."""
        return [(t.data_ptr(), t.dtype, t.numel(), t.is_contiguous()) for t in self.tensors]

    def _lay_out(self) -> tuple[dict[torch.device, Slots], list[tuple[Tensor, Tensor]]]:
        by_device: dict[torch.device, list[Slot]] = {}
        seen: set[int] = set()
        copies: list[tuple[Tensor, Tensor]] = []
        every = zip(self.tensors, self.indices, self.offsets, strict=True)
        for position, (tensor, index, offset) in enumerate(every):
            check_weight(tensor, f"tensors[{position}]")
            if tensor.numel() == 0:
                continue
            if id(tensor) in seen:
                raise ValueError(f"tensors[{position}] must not be in the list twice")
            seen.add(id(tensor))
            dense = tensor.detach().resolve_neg().contiguous()
            if dense.data_ptr() != tensor.data_ptr():
                copies.append((tensor.detach(), dense))
                tensor = dense
            by_device.setdefault(tensor.device, []).append(Slot(tensor, index, offset))
        return {device: Slots(slots) for device, slots in by_device.items()}, copies

    def mark_changed(self) -> None:
        """Tell autograd that the data changed, as torch's own in-place operations do."""
        increment_versions([t for t in self.tensors if not t.is_inference()])


def as_weights(
    tensors: Weights | Sequence[Tensor],
    indices: Sequence[int] | None,
    offsets: Sequence[int] | None,
) -> Weights:
    """What the operations take: a list with its places, or :class:`Weights`, which have them."""
    if not isinstance(tensors, Weights):
        return Weights(tensors, indices, offsets)
    if indices is not None or offsets is not None:
        raise ValueError("indices and offsets must be None where tensors is a Weights: it has them")
    return tensors
