"""Running a recorded step again on the meta device, to see its memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .derivatives import call, empty, inputs_of
from .memory import LiveBytes
from .recorded import Op, Trace


class Peaks(NamedTuple):
    """Bytes beside what was there before the step."""

    forward: int
    """Most at one moment of the forward."""
    step: int
    """Most at one moment of the forward and the backward."""
    kept: int
    """Alive between the two."""


class Replay:
    """Repeats a trace's forward, and its backward, for any set of tensors that train.

    Tensors live as long as they did when the closure ran, or as autograd keeps them.
    """

    def __init__(self, recorded: Trace) -> None:
        self._trace = recorded
        self._freed: dict[int, list[int]] = defaultdict(list)  # before an operation: storages
        for number, storage in enumerate(recorded.storages):
            if not storage.outside and storage.freed >= 0:
                self._freed[storage.freed].append(number)
        self._of_storage: dict[int, list[int]] = defaultdict(list)
        for number, value in enumerate(recorded.values):
            self._of_storage[value.storage].append(number)

    @torch.inference_mode(False)
    def run(self, chosen: int, applied: Mapping[int, int] | None = None) -> Peaks:
        """One step.

        Args:
            chosen: the bits of the tensors that train, as the trace numbers them; 0: a forward
                without gradients.
            applied: gradients are freed as soon as they are whole; the bytes that applying one
                takes meanwhile, by the tensor's bit. None: they are kept.
        """
        memory = _Memory(self._trace)
        for number, bit in self._trace.leaves.items():
            leaf = memory[number]
            if bit & chosen:
                leaf.requires_grad_()
                if applied is not None:
                    hook = _freeing(applied.get(bit, 0))
                    leaf.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        with LiveBytes() as watch:
            with torch.set_grad_enabled(chosen != 0):
                for k, op in enumerate(self._trace.ops):
                    self._free(memory, k)
                    memory.run(op)
            self._free(memory, len(self._trace.ops))
            forward, kept = watch.most, watch.now
            if chosen:
                loss = memory[self._trace.loss]
                torch.autograd.backward([loss], [torch.ones_like(loss)])
        return Peaks(forward, watch.most, kept)

    def _free(self, memory: _Memory, k: int) -> None:
        for storage in self._freed.get(k, ()):
            memory.free(storage, self._of_storage[storage])


def _freeing(workspace: int) -> Callable[[Tensor], None]:
    def hook(leaf: Tensor) -> None:
        torch.empty(workspace, dtype=torch.uint8, device="meta")
        leaf.grad = None

    return hook


class _Memory:
    """The tensors of a replay, by their numbers."""

    def __init__(self, recorded: Trace) -> None:
        self._trace = recorded
        self._tensors: dict[int, Tensor] = {}
        self._storages: dict[int, Any] = {}
        for number, storage in enumerate(recorded.storages):
            if storage.outside:
                block = torch.empty(storage.nbytes, dtype=torch.uint8, device="meta")
                self._storages[number] = block.untyped_storage()

    def __getitem__(self, number: int) -> Tensor:
        if number not in self._tensors:
            self[number] = self._made(number)
        return self._tensors[number]

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        self._tensors[number] = tensor
        place = self._trace.values[number].storage
        self._storages.setdefault(place, tensor.untyped_storage())

    def _made(self, number: int) -> Tensor:
        """A tensor without a graph, in the memory that it had."""
        value = self._trace.values[number]
        storage = self._storages.get(value.storage)
        if storage is None:
            return empty(value)
        tensor = torch.empty(0, dtype=value.dtype, device="meta")
        with torch.no_grad():
            return tensor.set_(storage, value.offset, value.shape, value.stride)

    def free(self, storage: int, numbers: list[int]) -> None:
        for number in numbers:
            self._tensors.pop(number, None)
        self._storages.pop(storage, None)

    def run(self, op: Op) -> None:
        """With autograd where it differentiated this operation; else only the outputs matter.

        Views are made where they need no gradient too: what is written to them may.
        """
        inputs = inputs_of(op)
        results: list[Any] = []
        needing = any(self[n].requires_grad for n in inputs)
        if needing and any(self[n].requires_grad for n in op.masks):
            try:
                results = call(op, {n: self[n] for n in inputs})
            except (RuntimeError, NotImplementedError, TypeError):
                results = self._stand_in(op, inputs)
        elif getattr(op.func, "is_view", False) and not needing:
            results = call(op, {n: self[n] for n in inputs})
        if results:
            for number, result in zip(op.outputs, results, strict=True):
                if number is not None:
                    self[number] = result
        else:
            for number in op.outputs:
                if number is not None:
                    _ = self[number]

    def _stand_in(self, op: Op, inputs: list[int]) -> list[Any]:
        """Where the operation cannot run on meta: outputs as they were, and what was saved."""
        places = set(self._trace.saved.get(op.node, ()))
        values = self._trace.values
        saved = [self[n] for n in inputs if values[n].storage in places]
        outputs = [n for n in op.outputs if n is not None]
        known = {values[n].storage for n in (*inputs, *outputs)}
        sizes = [self._trace.storages[s].nbytes for s in places - known]
        saved += [torch.empty(n, dtype=torch.uint8, device="meta") for n in sizes]
        made = [empty(values[n]) for n in outputs]
        saved += [t for t, n in zip(made, outputs, strict=True) if values[n].storage in places]
        wanting = [self[n] for n in inputs if n in op.masks]
        results = iter(_StandIn.apply(saved, made, *wanting))  # type: ignore[no-untyped-call]
        return [None if n is None else next(results) for n in op.outputs]


class _StandIn(torch.autograd.Function):
    """Takes the place of an operation; keeps what it kept, and gives gradients as large."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, saved: list[Tensor], made: list[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*saved)
        ctx.like = [(t.shape, t.dtype) for t in inputs]
        ctx.mark_non_differentiable(*(t for t in made if not t.is_floating_point()))
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor | None, ...]:
        made = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in ctx.like]
        return None, None, *made
