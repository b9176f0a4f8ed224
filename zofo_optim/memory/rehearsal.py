"""Steps without data: forward and backward passes on the meta device, and the bytes alive in them.

They are the passes themselves, of the same modules, autograd and checkpointing; only elements are
missing. So what lives when is not modelled but seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zofo_kernels._torch_compat import autocast_off_on_meta, backward_within

from ..costs.memory import LiveBytes
from ..costs.watched import attention
from ..names import within_peft
from ..saved_copies import SavedCopies
from ..watch import Answer
from .offloaded import Offloaded


class Backward(NamedTuple):
    """Of a forward with gradients and its backward; bytes beside what was there before."""

    kept: int
    """Activations alive between the two, the loss among them."""
    most: int
    """At one moment of both, gradients that there are by then among them."""
    left: int
    """As long as the loss is held: gradients, and leaves of its graph with theirs."""


class _Answered(TorchFunctionMode):
    """Attention is fused, as on a device; other calls are answered.

    A batch without elements is taken to be neither padded nor packed.
    """

    def __init__(self, answer: Answer | None, fused: bool) -> None:
        super().__init__()
        self._answer, self._fused = answer, fused

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if self._fused:  # a GPU's kernels drop without keeping what they dropped
                kwargs = {**kwargs, "dropout_p": 0.0}
            return attention(*args, **kwargs)
        if func is Tensor.__contains__ and args[0].is_meta:
            return False  # transformers 4 asks for padding where there is no mask
        if func is Tensor.__bool__ and args[0].is_meta:
            return True  # what transformers asks: whether a mask is all ones, and nothing packed
        if self._answer is not None and func not in (Tensor.backward, torch.autograd.backward):
            return self._answer(func, args, kwargs)
        return func(*args, **kwargs)


class Rehearsal:
    """Passes of one model.

    Args:
        closure: evaluates the loss, of tensors on meta.
        training: parameters that get gradients.
        fused: whether attention with dropout is fused, as on a GPU.
        offloaded: the weights that are; None: all are in memory.
    """

    def __init__(
        self,
        closure: Callable[[], Tensor],
        training: Collection[Tensor],
        fused: bool,
        offloaded: Offloaded | None = None,
    ) -> None:
        self._closure, self._training, self._fused = closure, training, fused
        self._offloaded = offloaded

    def evaluation(self, answer: Answer | None = None, written: Collection[Tensor] = ()) -> int:
        """The most bytes alive in an evaluation without gradients.

        Args:
            answer: makes the results of torch calls; None: torch does.
            written: offloaded weights that were written to before, and so are resident.
        """
        with self._watched(written) as watch, torch.no_grad(), self._run(answer):
            self._closure()
        return int(watch.most)

    def backward(
        self,
        applied: Mapping[Tensor, int] | None = None,
        answer: Answer | None = None,
        saved: SavedCopies | None = None,
    ) -> Backward:
        """An evaluation with gradients of what requires them.

        Args:
            applied: gradients are freed as soon as they are whole; the bytes that applying one
                takes meanwhile, by its parameter. None: they are kept, and freed here.
            answer: makes the results of torch calls; None: torch does.
            saved: keeps the answer's copies out of the graph.
        """
        hooks = [
            p.register_post_accumulate_grad_hook(_freeing(size))  # type: ignore[no-untyped-call]
            for p, size in (applied or {}).items()
        ]
        try:
            with (
                self._watched() as watch,
                torch.enable_grad(),
                nullcontext() if saved is None else saved.unkept(),
                self._run(answer),
            ):
                loss = self._closure()
                kept = watch.now
                loss.backward()  # type: ignore[no-untyped-call]
            return Backward(kept, watch.most, watch.now)
        finally:
            for hook in hooks:
                hook.remove()
            for p in self._training:
                p.grad = None

    def _watched(self, written: Collection[Tensor] = ()) -> LiveBytes:
        return LiveBytes() if self._offloaded is None else self._offloaded.watch(written)

    @contextmanager
    def _run(self, answer: Answer | None) -> Generator[None, None, None]:
        with (
            warnings.catch_warnings(),
            autocast_off_on_meta(),
            backward_within(_Answered(answer, self._fused)),  # layers that run again there
            _Answered(answer, self._fused),
        ):
            warnings.simplefilter("ignore")
            yield


def _freeing(workspace: int) -> Callable[[Tensor], None]:
    def hook(leaf: Tensor) -> None:
        torch.empty(workspace, dtype=torch.uint8, device="meta")
        leaf.grad = None

    return hook


def checkpointed(model: nn.Module) -> None:
    """Let each layer's activations be made again in the backward, as transformers does it.

    Raises:
        TypeError: the model is none of transformers' that can.
    """
    base: Any = within_peft(model)
    if not hasattr(base, "gradient_checkpointing_enable"):
        raise TypeError(
            "model must be of transformers where gradient_checkpointing=True, got "
            f"{type(base).__name__}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is to have another name
        base.gradient_checkpointing_enable(  # there is no generator on meta
            gradient_checkpointing_kwargs=dict(use_reentrant=False, preserve_rng_state=False)
        )
    model.train()
