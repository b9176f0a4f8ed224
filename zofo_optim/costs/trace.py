"""Recording one forward of a closure: its operations, and which tensors they depend on.

Autograd itself says what depends on what: the forward runs with ``requires_grad`` set for all
candidates, and the graph is read as it grows. What it would save is dropped at once, so a trace
takes no more memory than inference.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zofo_kernels._torch_compat import (
    READ_NUMBER,
    TorchDispatchMode,
    autocast_off_on_meta,
    is_custom_function,
    know_saving_hooks,
    last_sequence_number,
    saving_hook,
    sequence_number,
    tree_flatten,
    tree_leaves,
)

from .flops import flops_of
from .recorded import Op, Ref, Storage, Trace, Value
from .watched import LossWatch


def trace(closure: Callable[[], Any], candidates: Mapping[str, Tensor]) -> Trace:
    """Run the closure once, with gradients on, and record it.

    Its own calls of backward are left out. Losses of shape (B,) are averaged.

    Args:
        closure: returns the loss as a tensor, or calls backward on it.
        candidates: the tensors that may train; they require gradients now, and no other
            parameter does.

    Raises:
        TypeError: the closure neither returned a tensor nor called backward.
        ValueError: the loss is no scalar and no vector, has no graph, or its graph holds what
            cannot be counted: custom functions, checkpointing, gradients of gradients.
    """
    recorder = _Recorder(candidates)
    watch = LossWatch(recorder.whole)
    torch.clear_autocast_cache()
    know_saving_hooks()
    hooks = torch.autograd.graph.saved_tensors_hooks(recorder.pack, _unpack)
    with torch.enable_grad(), autocast_off_on_meta(), hooks, recorder, watch:
        loss = watch.loss(closure())
    torch.clear_autocast_cache()
    return recorder.finish(loss)


def _unpack(packed: Any) -> Tensor:
    raise ValueError(
        "closure must not take gradients itself to compute its loss, such as a gradient penalty's: "
        "what their backward costs is not counted"
    )


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees all operations below autograd."""

    def __init__(self, candidates: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._candidates = candidates
        names = list(candidates)
        self._bit_of = {id(candidates[name]): 1 << k for k, name in enumerate(names)}
        self._always = 1 << len(names)
        self._first: dict[int, int] = {}  # bit -> operation of first use
        self._masks: dict[Any, int] = {}  # of nodes; it holds them, so that they keep their ids
        self._claimed: set[int] = set()
        self._numbers = WeakTensorKeyDictionary()
        self._places: dict[int, tuple[int, Any]] = {}  # id of a storage -> its number, a weakref
        self._inside = False  # an operation that is recorded as a whole
        self._trace = Trace(always=self._always)
        self.pack = self._pack  # one object, to be known again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is READ_NUMBER and args[0].is_meta:
            raise ValueError(
                "closure must not read values of tensors on the meta device (item(), bool(), if), "
                "which has none: leave out what the question is about, such as an attention mask, "
                "or count costs with real tensors"
            )
        if self._inside:
            result = func(*args, **kwargs)
            self._trace.forward_flops += flops_of(func, args, kwargs, result)
            return result
        leaves, spec, masks = self._arguments(args, kwargs)
        node = -1
        if masks:
            number = last_sequence_number()
            if number in self._claimed:
                masks = {}  # an operation without derivative makes no node
            elif saving_hook() is not self.pack:
                raise ValueError(
                    "closure must leave to autograd what to save: turn gradient checkpointing and "
                    "hooks that offload or pack saved tensors off while costs are counted"
                )
            else:
                node = number
                self._claimed.add(number)
        result = func(*args, **kwargs)
        flops = flops_of(func, args, kwargs, result)
        self._trace.forward_flops += flops
        outputs = [
            self._number(out, outside=False) if isinstance(out, Tensor) else None
            for out in tree_leaves(result)
        ]
        self._trace.ops.append(Op(func, leaves, spec, outputs, masks, node, flops))
        return result

    def whole(self, func: Any, alone: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Run a function that has one tensor as its result, and record it as one operation.

        Args:
            func: a function of torch, which takes other ways where other tensors train.
            alone: does the same on the meta device.
            args, kwargs: for both.
        """
        leaves, spec, masks = self._arguments(args, kwargs)
        self._inside, before = True, self._trace.forward_flops
        try:
            result: Tensor = func(*args, **kwargs)
        finally:
            self._inside = False
        node = -1 if result.grad_fn is None else sequence_number(result.grad_fn)
        outputs: list[int | None] = [self._number(result, outside=False)]
        flops = self._trace.forward_flops - before
        self._trace.ops.append(Op(alone, leaves, spec, outputs, masks, node, flops))
        return result

    def _arguments(self, args: Any, kwargs: Any) -> tuple[list[Any], Any, dict[int, int]]:
        leaves, spec = tree_flatten((args, kwargs))
        masks = {}
        for k, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                number = self._number(leaf, outside=True)
                if (mask := self._mask(leaf)) != 0 and torch.is_grad_enabled():
                    masks[number] = mask
                leaves[k] = Ref(number)
        return leaves, spec, masks

    def _pack(self, tensor: Tensor) -> None:
        number = self._storage(tensor, outside=True)
        self._trace.saved.setdefault(last_sequence_number(), []).append(number)

    def _number(self, tensor: Tensor, outside: bool) -> int:
        number = self._numbers.get(tensor)  # type: ignore[no-untyped-call]
        if number is None:
            if tensor.layout is not torch.strided:
                raise ValueError(
                    "closure must not compute with sparse tensors for its costs to be counted, "
                    f"got one of layout {tensor.layout}"
                )
            values = self._trace.values
            number = self._numbers[tensor] = len(values)
            shape, stride = tuple(tensor.shape), tuple(tensor.stride())
            place = self._storage(tensor, outside)
            values.append(Value(shape, stride, int(tensor.storage_offset()), tensor.dtype, place))
            if tensor.requires_grad and tensor.grad_fn is None:
                self._trace.leaves[number] = self._mask(tensor)
        return int(number)

    def _storage(self, tensor: Tensor, outside: bool) -> int:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._places:
            storages = self._trace.storages
            number = len(storages)
            storages.append(Storage(storage.nbytes(), outside))
            gone = weakref.ref(storage, lambda _: self._freed(key, number))
            self._places[key] = number, gone
        return self._places[key][0]

    def _freed(self, key: int, number: int) -> None:
        self._places.pop(key, None)
        self._trace.storages[number].freed = len(self._trace.ops)

    def _mask(self, tensor: Tensor) -> int:
        """The candidates that a tensor depends on."""
        if not tensor.requires_grad:
            return 0
        if tensor.grad_fn is not None:
            return self._mask_of_node(tensor.grad_fn)
        bit = self._bit_of.get(id(tensor), self._always)
        self._first.setdefault(bit, len(self._trace.ops))
        return bit

    def _mask_of_node(self, root: Any) -> int:
        known, stack = self._masks, [root]
        while stack:
            node = stack[-1]
            below = [n for n, _ in node.next_functions if n is not None]
            missing = [n for n in below if n not in known]
            if node not in known and missing:
                stack += missing
                continue
            stack.pop()
            if node in known:
                continue
            mask = 0
            for n in below:
                mask |= known[n]
            if hasattr(node, "variable"):
                mask |= self._bit_of.get(id(node.variable), self._always)
            known[node] = mask
        return known[root]

    def finish(self, loss: Tensor) -> Trace:
        """What was recorded, of the part that the loss depends on."""
        recorded = self._trace
        reached, custom = _walk(loss.grad_fn)
        if custom:
            raise ValueError(
                "closure must compute its loss by torch's own operations for costs to be counted, "
                f"got {', '.join(sorted(custom))}: profile the model uncompiled, without gradient "
                "checkpointing, backward hooks of modules (register_full_backward_hook) and custom "
                "autograd functions"
            )
        recorded.reached = reached
        recorded.loss = self._number(loss, outside=False)
        mask = self._mask(loss)
        bits = {name: self._bit_of[id(p)] for name, p in self._candidates.items()}
        used = [name for name, bit in bits.items() if bit & mask]
        recorded.order = sorted(used, key=lambda name: self._first.get(bits[name], 0))
        recorded.bits = bits
        recorded.unused = tuple(name for name, bit in bits.items() if not bit & mask)
        for _, gone in self._places.values():
            storage = gone()
            if storage is not None:
                recorded.storages[self._places[id(storage)][0]].freed = -1
        self._places = {}  # without the weakrefs nothing more is told
        self._masks = {}
        return recorded


def _walk(root: Any) -> tuple[frozenset[int], set[str]]:
    """Sequence numbers of the nodes below a root, and names of those that Python wrote."""
    seen: set[Any] = set()
    custom: set[str] = set()
    stack, numbers = [root], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_custom_function(node):
            custom.add(type(node).__name__.removesuffix("Backward"))
        numbers.add(sequence_number(node))
        stack += [n for n, _ in node.next_functions]
    return frozenset(numbers), custom
