"""Lists of weights: checked, and laid out for the backends, once for many passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._torch_compat import increment_versions, is_wrapper_subclass
from .layout import Layout
from .memory import check_storage, first_shared, overlaps_itself
from .region import Region, extent
from .structure import matrix_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_weight(tensor: Tensor, name: str = "tensor") -> None:
    """Raise TypeError or ValueError where a tensor cannot be perturbed in place.

    Raises:
        TypeError: not a dense tensor of a floating dtype that the kernels know.
        ValueError: a meta tensor, one whose storage is gone, or one whose elements share memory,
            as those of an expanded tensor do.
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
            "cannot be perturbed in place; load them unquantised and unsharded, or leave them out"
        )
    if tensor.is_meta:
        raise ValueError(
            f"{name} must hold data, got a tensor on the meta device, where accelerate leaves the "
            "weights that it offloads to the CPU or to disk: call "
            "zofo_optim.offload.offload_weights(model) first, by which they train from a file, "
            "load them without offloading, or leave them out (exclude=)"
        )
    check_storage(tensor, name)
    if not tensor.is_contiguous() and overlaps_itself(tensor):
        raise ValueError(f"{name} must not share memory among its elements (expanded tensor?)")


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
    indices: Sequence[int] | None, offsets: Sequence[int] | None, extents: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Indices and offsets of tensors that reach so far, with defaults; see :class:`Weights`."""
    indices = _check_list("indices", indices, list(range(len(extents))), 1 << 32)
    offsets = _check_list("offsets", offsets, [0] * len(extents), 1 << 63)
    for offset, size in zip(offsets, extents, strict=True):
        if offset + size > 1 << 63:
            raise ValueError(
                f"offsets must leave room for the tensor's elements below 2**63, got {offset} "
                f"for a tensor whose elements span {size} of its parameter's"
            )
    return indices, offsets


_ONE_RUN = (1, 1)
"""Rows of one element, at a distance of one: all elements follow one another."""


def check_rectangles(
    rectangles: Sequence[tuple[int, int] | None] | None, sizes: Sequence[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Row length and stride of each tensor, and how far it reaches in its parameter.

    See :class:`Weights`.
    """
    if rectangles is None:
        return [_ONE_RUN] * len(sizes), list(sizes)
    if len(rectangles) != len(sizes):
        raise ValueError(
            f"rectangles must have one entry a tensor ({len(sizes)}), got {len(rectangles)}"
        )
    chosen, extents = [], []
    for position, (rectangle, size) in enumerate(zip(rectangles, sizes, strict=True)):
        match rectangle:
            case None:
                rectangle = _ONE_RUN
            case (int(), int()) if not any(isinstance(value, bool) for value in rectangle):
                pass
            case _:
                raise TypeError(
                    "rectangles must hold None or (row length, row stride), two ints, got "
                    f"{rectangle!r}"
                )
        chosen.append(rectangle)
        extents.append(extent("rectangles", position, size, *rectangle))
    return chosen, extents


_Place = tuple[int, int, tuple[int, int] | None, Sequence[int] | None]
"""Of a tensor: what :class:`Weights` takes beside it."""


class Weights:
    """A list of tensors to perturb and update many times, with their places in the noise.

    The operations take one in place of a list of tensors. Checks and tables of addresses are made
    when first needed, and made again where a tensor's storage has moved or its dtype or layout
    has changed since. All other passes cost the host little.

    Args:
        tensors: the weights, any strides, dtypes and devices; empty ones are skipped.
        indices: of each tensor's parameter among the zeroth-order parameters, in [0, 2**32);
            default 0, 1, ...
        offsets: index of each tensor's first element in the full parameter, in [0, 2**63);
            default 0.
        rectangles: for each tensor that is a rectangle of its parameter with gaps between its
            rows, such as ``Shard(1)``: the length of a row, and the stride of rows in the full
            parameter; see :class:`Region`. None for one whose elements follow one another;
            default None for all.
        shapes: of each tensor's full parameter, which directions of low rank depend on; None, the
            default, for those that are their parameter's.
        passed: called with a tensor when a pass is done with it, and before it begins with
            the next one, to let its pages go for example; must not raise. None: passes take
            tensors together, which is faster where they are small.

    Raises:
        TypeError, ValueError: indices, offsets or rectangles that cannot be; tensors that cannot
            be, when they are first used.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        indices: Sequence[int] | None = None,
        offsets: Sequence[int] | None = None,
        rectangles: Sequence[tuple[int, int] | None] | None = None,
        shapes: Sequence[Sequence[int] | None] | None = None,
        passed: Callable[[Tensor], None] | None = None,
    ) -> None:
        if isinstance(tensors, Tensor):
            raise TypeError("tensors must be a sequence of tensors, got one tensor; pass [tensor]")
        self.tensors = list(tensors)
        sizes = [t.numel() if isinstance(t, Tensor) else 0 for t in self.tensors]
        self._rectangles, extents = check_rectangles(rectangles, sizes)
        self.indices, self.offsets = check_places(indices, offsets, extents)
        self._shapes = [None] * len(sizes) if shapes is None else list(shapes)
        if len(self._shapes) != len(sizes):
            raise ValueError(
                f"shapes must have one entry a tensor ({len(sizes)}), got {len(self._shapes)}"
            )
        self._passed = passed
        self._seen: list[tuple[object, ...]] | None = None
        self._layout = Layout([])

    def singly(self) -> list[Weights]:
        """One of each tensor."""
        return [
            Weights(
                [tensor],
                [self.indices[k]],
                [self.offsets[k]],
                [self._rectangles[k]],
                self._shapes[k : k + 1],
            )
            for k, tensor in enumerate(self.tensors)
        ]

    def cut(self, sizes: Sequence[int | None], passed: Callable[[Tensor], None]) -> Weights:
        """The same weights in pieces, so that a pass needs only few of their bytes at a time.

        Noise belongs to elements and not to tensors: a pass over them is the pass over these, to
        the bit.

        Args:
            sizes: for each tensor, the elements of a piece; None: it stays whole, as those stay
                that are not contiguous, or are rectangles with gaps.
            passed: see the class; called with pieces.
        """
        tensors: list[Tensor] = []
        places: list[_Place] = []
        own = zip(self.indices, self.offsets, self._rectangles, self._shapes, strict=True)
        for tensor, size, (index, offset, run, shape) in zip(self.tensors, sizes, own, strict=True):
            if size is None or run != _ONE_RUN or not tensor.is_contiguous():
                tensors.append(tensor)
                places.append((index, offset, run, shape))
                continue
            full = tensor.shape if shape is None else shape
            flat = tensor.detach().view(-1)
            for low in range(0, flat.numel(), size):
                tensors.append(flat[low : low + size])
                places.append((index, offset + low, None, full))
        indices, offsets, rectangles, shapes = zip(*places, strict=True)
        return Weights(tensors, indices, offsets, rectangles, shapes, passed)

    def layout(self) -> Layout:
        """The regions, checked; those of the pass before where no tensor's memory has changed."""
        if self._seen is None or self._signature() != self._seen:
            self._seen = None
            self._layout = self._lay_out()
            self._seen = self._signature()
        return self._layout

    def _signature(self) -> list[tuple[object, ...]]:
        """What must not change for addresses to hold; a storage that is freed moves, too."""
        return [
            (t.data_ptr(), t.dtype, t.shape, t.is_contiguous() or t.stride()) for t in self.tensors
        ]

    def _lay_out(self) -> Layout:
        regions: list[Region] = []
        seen: set[int] = set()
        places = zip(self.indices, self.offsets, self._rectangles, strict=True)
        every = zip(self.tensors, places, self._shapes, strict=True)
        for position, (tensor, (index, offset, rectangle), shape) in enumerate(every):
            check_weight(tensor, f"tensors[{position}]")
            if tensor.numel() == 0:
                continue
            if id(tensor) in seen:
                raise ValueError(f"tensors[{position}] must not be in the list twice")
            seen.add(id(tensor))
            matrix = matrix_of(tensor.shape if shape is None else shape)
            regions.append(Region(tensor, index, offset, *rectangle, matrix))
        if shared := first_shared(self.tensors):
            first, second = shared
            raise ValueError(f"tensors[{second}] must not share memory with tensors[{first}]")
        return Layout(regions, self._passed)

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
