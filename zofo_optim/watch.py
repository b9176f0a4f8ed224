"""Watching a closure as it runs: its calls of backward, and what a captured graph cannot do.

One torch-function mode for all that looks at torch calls: a mode by itself costs a few
microseconds a call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zofo_kernels._torch_compat import (
    READ_GRAD,
    SET_GRAD_ENABLED,
    backward_within,
    in_functorch,
    show_backward_to_modes,
)

from .capture import capturing, check_replayable

_NEAR = 50
"""Operations between a loss and what it was computed from: divisions, sums, means."""
Answer = Callable[[Any, "tuple[Any, ...]", "dict[str, Any]"], Any]
"""Makes a torch call's result, from the function and its arguments."""


class Look(Protocol):
    """Is told what is back-propagated, before, and whose gradients a closure reads."""

    def look(self, root: Tensor, scaled: bool) -> None: ...

    def looked_at(self, parameter: Tensor) -> None: ...


class ClosureWatch(TorchFunctionMode):
    """Notices, or swallows, the closure's own calls of backward; refuses what graphs cannot do.

    A closure may call backward for two ends: to leave the gradients of its loss, which must happen
    in one evaluation only, or to compute something that the loss depends on, as gradient penalties
    do, which must happen in all. See :meth:`inner_calls`.

    Args:
        swallow: skip the calls of backward, and keep gradients off.
        inner: positions of the calls that are not skipped; then gradients stay on.
        answer: makes the results of torch calls; None: torch does.
        look: is told what the closure back-propagates, before, and whose gradients it reads.
    """

    def __init__(
        self,
        swallow: bool,
        inner: Collection[int] = (),
        answer: Answer | None = None,
        look: Look | None = None,
    ) -> None:
        super().__init__()
        show_backward_to_modes()
        self._answer, self._look = answer, look
        self._made = inner
        self._roots: list[list[Any]] = []  # one list a call
        self._scaled: tuple[Any, Any] = None, None  # what a GradScaler made, and what of
        self.swallow = swallow
        self.captured = capturing()

    @property
    def calls(self) -> int:
        """How often the closure has called backward."""
        return len(self._roots)

    def inner_calls(self, loss: Tensor) -> frozenset[int]:
        """Positions of the calls that back-propagated something else than the closure's loss.

        A call is one for the loss where the graph that it went through and the loss's share an
        operation; leaves, which are parameters, may be shared by all. A scaled loss, or one of two
        losses whose sum is returned, is so the closure's own. A loss without a graph tells
        nothing: then all calls are taken to be for it.
        """
        if not loss.requires_grad:
            return frozenset()
        root = [_node(loss)]
        return frozenset(k for k, roots in enumerate(self._roots) if not _meet(root, roots))

    def unscaled(self, loss: Tensor) -> Tensor:
        """The loss without the scale, where it is what a GradScaler's ``scale`` gave last."""
        scaled, plain = self._scaled
        return plain if loss is scaled else loss

    def holds_a_scale(self, loss: Tensor) -> bool:
        """Whether the loss was computed from what a GradScaler's ``scale`` gave last."""
        scaled, _ = self._scaled
        if scaled is None or scaled is loss or scaled.grad_fn is None:
            return False
        return _is_near(_node(loss), scaled.grad_fn)

    def stop(self) -> None:
        """Only pass calls on, should a Ctrl-C have kept the mode from being left."""
        self.swallow = self.captured = False
        self._roots, self._scaled, self._answer = [], (None, None), None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # comparisons, one by one: torch.compile traces this, and has no look-ups of functions
        if func is Tensor.backward or func is torch.autograd.backward:
            self._roots.append(_roots(*args, **kwargs))
            if self.swallow and self.calls - 1 not in self._made:
                return None
            look, scaled = self._look, self._scaled[0] is not None
            if look is not None:
                for root in _tensors(*args, **kwargs):
                    look.look(root, scaled)
        if self._look is not None and func == READ_GRAD:
            self._look.looked_at(args[0])
        if func is SET_GRAD_ENABLED and self.swallow and not self._made and not in_functorch():
            args = (False,)  # Lightning's closures turn them on, and would keep activations
        if self.captured:
            check_replayable(func, args, kwargs)
        if func is Tensor.mul and _called_by_a_scaler():
            self._scaled = self._result(func, args, kwargs), args[0]
            return self._scaled[0]
        return self._result(func, args, kwargs)

    def _result(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs) if self._answer is None else self._answer(func, args, kwargs)


def answering(answer: Answer | None) -> AbstractContextManager[None]:
    """Torch calls in backward passes are answered too: checkpointed layers run again there."""
    return nullcontext() if answer is None else backward_within(_Answering(answer))


class _Answering(TorchFunctionMode):
    """Makes the results of torch calls, and watches nothing."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # named here: `show_backward_to_modes` may replace the function after this import
        if func not in (Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            return self._answer(func, args, kwargs or {})
        with answering(self._answer):  # a backward in a backward, perhaps in a thread of autograd's
            return self._answer(func, args, kwargs or {})


def _tensors(tensors: Any = (), *unused: Any, **options: Any) -> Sequence[Any]:
    """What a call of ``Tensor.backward`` or ``torch.autograd.backward`` starts from."""
    tensors = options.get("self", tensors)
    single = isinstance(tensors, Tensor) or hasattr(tensors, "node")
    return [tensors] if single else tensors


def _roots(*args: Any, **options: Any) -> list[Any]:
    """The operations that such a call starts from."""
    return [_node(t) for t in _tensors(*args, **options)]


def _called_by_a_scaler() -> bool:
    """Whether the torch call that a mode sees now was made by a GradScaler's module."""
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return str(caller).startswith("torch.") and str(caller).endswith("grad_scaler")


def _node(tensor: Any) -> Any:
    """The operation that made a tensor; the tensor itself where it is a leaf."""
    if not isinstance(tensor, Tensor):
        return tensor.node  # a torch.autograd.graph.GradientEdge
    return tensor if tensor.grad_fn is None else tensor.grad_fn


def _meet(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether two graphs share an operation; both are walked in turn, from their roots down."""
    seen: tuple[dict[int, Any], dict[int, Any]] = {}, {}  # nodes that live keep their ids
    fronts = [list(ours), list(theirs)]
    while any(fronts):
        for side, other in ((0, 1), (1, 0)):
            below = []
            for node in fronts[side]:
                if id(node) in seen[other]:
                    return True
                if id(node) not in seen[side]:
                    seen[side][id(node)] = node
                    below += [n for n, _ in getattr(node, "next_functions", ()) if _operates(n)]
            fronts[side] = below
    return False


def _is_near(root: Any, wanted: Any) -> bool:
    """Whether an operation is among the last ones of a graph: the rest may be thousands."""
    front = [root]
    for _ in range(_NEAR):
        if not front:
            return False
        node = front.pop(0)
        if node is wanted:
            return True
        front += [n for n, _ in getattr(node, "next_functions", ()) if n is not None]
    return False


def _operates(node: Any) -> bool:
    return node is not None and type(node).__name__ != "AccumulateGrad"
