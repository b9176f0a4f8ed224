"""How sensitive the loss is to each tensor: what GreenTrainer and Hi-ZFO choose by.

The importance of tensor k is I_k = -sum(g_k dw_k): the decrease of the loss, to first order, that
the first step dw_k of the first-order optimizer brings, with the gradient g_k. Then it is divided
by the largest |I|.

GreenTrainer's code (Huang et al. 2024) makes the step, takes the gradients once more at the moved
weights, and multiplies these by dw. That needs a copy of all weights, all gradients at once, and a
second backward. Here g_k is the gradient at the weights themselves, so that each tensor is dealt
with inside the one backward, in memory of its own size; no weight is written. The two agree to
first order in the learning rate.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..buffers import Buffers
from ..costs.candidates import requiring
from ..evaluation import Closure, GlobalRandomState, averaged, evaluate
from ..modes import undisturbed
from .trial_step import Told, TrialStep


class Profile(NamedTuple):
    """What the backward passes of some batches tell of each tensor, by name."""

    importance: dict[str, float]
    """-sum(g dw), its mean over the batches, divided by the largest absolute value."""
    gradient_norm: dict[str, float]
    """Norm of the gradient, its root mean square over the batches."""


def profile_of(
    model: nn.Module,
    closures: Sequence[Closure],
    tensors: Mapping[str, Tensor],
    step: TrialStep,
) -> Profile:
    """Run each closure with one backward, and see what it says of the tensors.

    Gradients are used and freed as the backward makes them, so that the memory is that of the
    activations and of one gradient, with little beside it (see :meth:`TrialStep.of`). A tensor
    whose gradient comes in parts, as with re-entrant checkpointing or several calls of backward,
    makes a batch run again, in which its parts are summed in ``.grad``.

    Weights are not written. ``.grad``, ``requires_grad``, buffers and the global random state are
    then as before.

    Args:
        model: whose parameters the tensors are; all others require no gradient meanwhile.
        closures: one a batch; each returns the loss (a scalar, or the losses of examples, which are
            averaged), or calls ``backward`` itself.
        tensors: by name.
        step: see :class:`TrialStep`.

    Raises:
        TypeError, ValueError: a closure's result is no loss with a graph, or there is no closure.
        FloatingPointError: a gradient is not finite.
    """
    if not closures:
        raise ValueError("closure must be a function or a sequence of them, got none")
    names = {id(p): name for name, p in tensors.items()}
    gains = dict.fromkeys(tensors, 0.0)
    squares = dict.fromkeys(tensors, 0.0)
    reached = False
    devices = {p.device for p in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(undisturbed())
        stack.callback(GlobalRandomState(devices).restore)
        stack.enter_context(Buffers(model).as_before())
        stack.enter_context(requiring(model, tensors))
        parts: set[int] = set()
        for closure in closures:
            found = _batch(model, closure, list(tensors.values()), step, parts, devices)
            for key, (gain, square) in found.items():
                name = names[key]
                if not torch.isfinite(torch.stack([gain, square])).all():
                    raise FloatingPointError(
                        f"closure must give finite gradients, got one that is not, of {name!r}; "
                        "profile without a GradScaler, at weights whose loss is finite"
                    )
                gains[name] += gain.item() / len(closures)
                squares[name] += square.item() / len(closures)
                reached = True
    largest = max(map(abs, gains.values()), default=0.0)
    if reached and not largest:
        raise ValueError(
            "fo must hold a learning rate by which some tensor moves, got a first step after which "
            f"no weight differs (lr={step.lr!r})"
        )
    return Profile(
        {name: gain / (largest or 1.0) for name, gain in gains.items()},
        {name: square**0.5 for name, square in squares.items()},
    )


def _batch(
    model: nn.Module,
    closure: Closure,
    tensors: Sequence[Tensor],
    step: TrialStep,
    parts: set[int],
    devices: Collection[torch.device],
) -> dict[int, Told]:
    """By tensor. ``parts`` gets those whose gradient comes in parts."""
    while True:
        before = GlobalRandomState(devices)
        known = len(parts)
        with Buffers(model).as_before():
            found = _run(closure, tensors, step, parts)
        if len(parts) == known:
            return found
        before.restore()


def _run(
    closure: Closure, tensors: Sequence[Tensor], step: TrialStep, parts: set[int]
) -> dict[int, Told]:
    found: dict[int, Told] = {}

    def use(p: Tensor) -> None:
        if p.grad is None:
            return
        gradient, p.grad = p.grad, None
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        found[id(p)] = step.of(p, gradient)

    def come(p: Tensor) -> None:
        if id(p) in found:
            parts.add(id(p))
        if id(p) not in parts:
            with torch.no_grad():
                use(p)

    handles = [
        p.register_post_accumulate_grad_hook(come)  # type: ignore[no-untyped-call]
        for p in tensors
    ]
    try:
        done = evaluate(averaged(closure), gradients=True)
        if not done.backpropagated and not found:
            raise TypeError(
                "closure must return the loss as a tensor with a graph, or call backward itself, "
                f"got {_described(done.returned)}"
            )
        for p in tensors:  # what came in parts, or was set by the closure
            use(p)
    finally:
        for handle in handles:
            handle.remove()
        for p in tensors:
            p.grad = None
    return found


def _described(returned: Any) -> str:
    if isinstance(returned, Tensor):
        return f"a tensor without one, of shape {tuple(returned.shape)}"
    return f"{type(returned).__name__} {returned!r:.80}"
