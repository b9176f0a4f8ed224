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

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zofo_kernels._torch_compat import unhooked_step

from ..buffers import Buffers
from ..checks import NOTES
from ..costs.candidates import requiring
from ..defaults import default
from ..evaluation import Closure, GlobalRandomState, evaluate
from ..first_order import first_order_options
from ..modes import undisturbed

SHARED: dict[str, Any] = dict(
    lr=1e-3,
    momentum=0,
    dampening=0,
    weight_decay=0,
    nesterov=False,
    maximize=False,
    capturable=False,
)
"""Arguments of HybridZOFO's own that it passes on, and what they are by default."""


class Profile(NamedTuple):
    """What the backward passes of some batches tell of each tensor, by name."""

    importance: dict[str, float]
    """-sum(g dw), its mean over the batches, divided by the largest absolute value."""
    gradient_norm: dict[str, float]
    """Norm of the gradient, its root mean square over the batches."""
    without_gradient: tuple[str, ...]
    """Tensors that got none in any batch; 0 in the others."""


class TrialStep:
    """The step that a first-order optimizer would make first, for one tensor at a time.

    Args:
        fo_optimizer: a torch optimizer class.
        options: of it, as :class:`zofo_optim.HybridZOFO` or a first-order group is given them.

    Raises:
        TypeError, ValueError: options that the class does not take.
    """

    def __init__(self, fo_optimizer: Callable[..., Optimizer], options: Mapping[str, Any]) -> None:
        own = {name: value for name, value in options.items() if name not in NOTES}
        shared = {name: own.pop(name, default(value)) for name, value in SHARED.items()}
        self._factory = fo_optimizer
        self.options, self._defaults = first_order_options(fo_optimizer, shared, own)
        self._sign = 1.0 if self._defaults.get("maximize") else -1.0

    @property
    def lr(self) -> Any:
        """The learning rate; None where the class has none."""
        return self._defaults.get("lr")

    def gain(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """-sum(g dw), a 0-dim tensor; with ``maximize`` sum(g dw). Neither tensor is written.

        In double precision, where the device has it: a step may be smaller than the spacing of
        the weights in their own.
        """
        kind = torch.float32 if weight.device.type == "mps" else torch.float64
        before = weight.detach().to(kind)
        trial = nn.Parameter(before.clone())
        trial.grad = gradient.detach().to(kind, copy=True)
        optimizer = self._factory([trial], **self.options)
        unhooked_step(optimizer)(optimizer)
        # the optimizer may have written to .grad
        return self._sign * (gradient.detach().to(kind) * (trial.detach() - before)).sum()


def profile_of(
    model: nn.Module,
    closures: Sequence[Closure],
    tensors: Mapping[str, Tensor],
    step: TrialStep,
) -> Profile:
    """Run each closure with one backward, and see what it says of the tensors.

    Gradients are used and freed as the backward makes them, so that the memory is that of the
    activations, and of some copies of one tensor in double precision. A tensor whose gradient comes
    in parts, as with re-entrant checkpointing or several calls of backward, makes a batch run
    again, in which its parts are summed in ``.grad``.

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
    reached: set[str] = set()
    devices = {p.device for p in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(undisturbed())
        stack.callback(GlobalRandomState(devices).restore)
        stack.enter_context(Buffers(model).as_before())
        stack.enter_context(requiring(model, tensors))
        stack.enter_context(_gradients_aside(model, tensors.values()))
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
                reached.add(name)
    largest = max(map(abs, gains.values()), default=0.0)
    if reached and not largest:
        raise ValueError(
            "fo must hold a learning rate by which some tensor moves, got a first step after which "
            f"no weight differs (lr={step.lr!r})"
        )
    return Profile(
        {name: gain / (largest or 1.0) for name, gain in gains.items()},
        {name: square**0.5 for name, square in squares.items()},
        tuple(name for name in tensors if name not in reached),
    )


@contextmanager
def _gradients_aside(model: nn.Module, tensors: Iterable[Tensor]) -> Generator[None, None, None]:
    """In the block ``.grad`` is None; afterwards it is what it was."""
    before = {id(p): (p, p.grad) for p in (*model.parameters(), *tensors)}
    try:
        for p, _ in before.values():
            p.grad = None
        yield
    finally:
        for p, grad in before.values():
            p.grad = grad


def _batch(
    model: nn.Module,
    closure: Closure,
    tensors: Sequence[Tensor],
    step: TrialStep,
    parts: set[int],
    devices: Collection[torch.device],
) -> dict[int, tuple[Tensor, Tensor]]:
    """By tensor: gain and squared norm. ``parts`` gets those whose gradient comes in parts."""
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
) -> dict[int, tuple[Tensor, Tensor]]:
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def use(p: Tensor) -> None:
        if p.grad is None:
            return
        gradient, p.grad = p.grad, None
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        square = gradient.detach().double() if gradient.device.type != "mps" else gradient
        found[id(p)] = step.gain(p, gradient), square.square().sum()

    def come(p: Tensor) -> None:
        if id(p) in found:
            parts.add(id(p))
        if id(p) not in parts:
            with torch.no_grad():
                use(p)

    def averaged() -> Any:
        loss = closure()
        return loss.mean() if isinstance(loss, Tensor) and loss.dim() == 1 else loss

    handles = [
        p.register_post_accumulate_grad_hook(come)  # type: ignore[no-untyped-call]
        for p in tensors
    ]
    try:
        done = evaluate(averaged, gradients=True)
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
