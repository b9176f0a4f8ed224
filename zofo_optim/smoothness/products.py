"""Products of the Hessian with vectors: from differences of gradients, or by double backward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zofo_kernels import interruptible

from ..buffers import Buffers
from ..evaluation import Closure, GlobalRandomState, averaged, evaluate, scalar_loss
from ..modes import undisturbed
from ..watch import ClosureWatch
from .bystanders import Bystanders, nodes
from .closures import NoBackward, check_graph, no_graph, scaled
from .seeing import SeeingShort
from .vectors import norm, scale_of

METHODS = ("finite_difference", "exact")
_RELATIVE_STEP = 1e-4
"""Of the norm of the weights; see :class:`HessianProducts`."""
_SAME = 1e-4
"""What losses at the same weights may differ by: GPUs sum in any order."""


class HessianProducts:
    """Products H v, of the Hessian's diagonal block of some parameters; a context manager.

    "finite_difference": H v = [grad f(x + t v) - grad f(x)] / t, where t v has the length ``step``
    (Ma, Yu, Huang 2026, App. D.4); one gradient a product, and an evaluation at first. Its error is
    step / 2 times the third derivative along v / |v|, and some 1e-6 |grad f| / step from rounding,
    for float32. Where the gradient jumps (ReLU) it grows as 1 / sqrt(step). Takes memory for a copy
    of the parameters and two gradients.

    "exact": double backward (Pearlmutter 1994); one backward through the graph of the gradient,
    which is kept. Attention runs in its plain form then, as fused ones have no second derivative.

    In the block the parameters require gradients, those in ``others`` do not, and none has a
    ``.grad``. Between products, and after the block, weights, ``.grad``, ``requires_grad``, buffers
    and global generators are as before it, to the bit, also where a closure raises. All evaluations
    draw the same random numbers.

    Args:
        tensors: the parameters, by name, all of one device kind.
        closures: each returns the loss (a scalar, or the losses of examples, which are averaged),
            or calls ``backward`` itself ("exact": returns it with its graph). f is their mean.
        method: one of :data:`METHODS`.
        step: length of the displacement; None: 1e-4 of the norm of the parameters, whose root mean
            square counts as 0.01 at least.
        buffers: those that closures change.
        others: parameters for which no gradients are computed meanwhile; of all others, they are
            computed and dropped.
        may_miss: a loss without a graph to the parameters has no gradient and no curvature there.

    Raises:
        RuntimeError: a closure writes parameters, or gives two losses at the same weights.
        TypeError: on entering: a closure's result is no loss with a graph; the parameters have 16
            bits, or the closure runs under autocast, where differences of gradients are those of
            rounding.
        ValueError: ``method`` or ``step`` is out of range, or a GradScaler scaled the loss.
        FloatingPointError: a gradient is not finite.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        closures: Sequence[Closure],
        *,
        method: str = "finite_difference",
        step: float | None = None,
        buffers: Buffers | None = None,
        others: Sequence[Tensor] = (),
        may_miss: bool = False,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        check_step(step)
        self._tensors = tensors
        self._parameters = list(tensors.values())
        self._closures = closures
        self._exact = method == "exact"
        self._step = step
        self._buffers = buffers or Buffers()
        self._every = list({id(p): p for p in (*self._parameters, *others)}.values())
        self._may_miss = may_miss
        self.reached = False
        """Whether the loss has a graph to one of the parameters."""
        self._stack = ExitStack()
        self.evaluations = 0
        """Of closures, each with a backward."""

    def __enter__(self) -> HessianProducts:
        for name, p in self._tensors.items():
            if p.dtype not in (torch.float32, torch.float64) and not self._exact:
                raise TypeError(
                    "target must have float32 or float64 weights where "
                    f"method='finite_difference', got {p.dtype} in {name!r}, in which gradients at "
                    "near points differ by rounding; take method='exact', or model.float()"
                )
        with ExitStack() as stack:
            stack.enter_context(undisturbed())
            self._random = GlobalRandomState({p.device for p in self._parameters})
            stack.callback(self._random.restore)
            stack.enter_context(self._buffers.as_before())
            ours = {id(p) for p in self._parameters}
            for p in self._every:
                stack.callback(_put_back, p, p.requires_grad, p.grad)
                p.requires_grad_(id(p) in ours)
                p.grad = None
            if self._exact:  # also while checkpointed layers run again
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self._step is None:
                self._step = _RELATIVE_STEP * scale_of(self._parameters)
            self._kept = tuple(p.detach().clone() for p in self._parameters)
            self._versions = [p._version for p in self._every]
            #: Of the mean loss, at the weights; one tensor a parameter, in order.
            if self._exact:
                self.gradient, self.loss = self._graph()
                self._kept = ()
            else:
                with SeeingShort() as seeing:
                    self.gradient, self.loss = self._taken()
                if seeing.seen:
                    raise TypeError(
                        "closure must not compute in 16 bits (weights, or autocast) where "
                        "method='finite_difference': gradients at near points differ by rounding "
                        "there; take method='exact', or compute in float32"
                    )
                self._check_repeats()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._differentiable: list[Tensor] = []
        self._kept = ()
        self._stack.close()

    @property
    def parameters(self) -> list[Tensor]:
        """In the order of what products take and give."""
        return self._parameters

    @property
    def differs(self) -> bool:
        """Whether products are differences of gradients."""
        return not self._exact

    @property
    def step(self) -> float:
        """The length of a displacement."""
        return float(self._step or 0.0)

    def __call__(self, v: Sequence[Tensor], step: float | None = None) -> list[Tensor]:
        """H v: a tensor a parameter, as ``v`` has; ``step`` in place of :attr:`step`."""
        length = norm(v)
        if not length:
            return [torch.zeros_like(p) for p in self._parameters]
        if self._exact:
            return self._product(v)
        return self._difference(v, (self.step if step is None else step) / length)

    def _difference(self, v: Sequence[Tensor], t: float) -> list[Tensor]:
        try:
            for p, x in zip(self._parameters, v, strict=True):
                p.add_(x, alpha=t)
            self._versions = [p._version for p in self._every]
            moved, _ = self._taken()
        finally:
            self._restore()
        return [(there - here).div_(t) for there, here in zip(moved, self.gradient, strict=True)]

    def _product(self, v: Sequence[Tensor]) -> list[Tensor]:
        pairs = [(g, x) for g, x in zip(self._differentiable, v, strict=True) if g.requires_grad]
        if not pairs:  # the loss is linear
            return [torch.zeros_like(p) for p in self._parameters]
        with torch.enable_grad(), interruptible():
            return list(
                torch.autograd.grad(
                    [g for g, _ in pairs],
                    self._parameters,
                    [x for _, x in pairs],
                    retain_graph=True,
                    materialize_grads=True,
                )
            )

    def _taken(self) -> tuple[list[Tensor], float]:
        """The gradient, by one backward a closure, and the loss."""
        total = [torch.zeros_like(p) for p in self._parameters]
        loss = 0.0
        share = 1 / len(self._closures)
        for closure in self._closures:
            self._random.restore()
            bystanders = Bystanders(self._every)
            try:
                with self._buffers.as_before(), bystanders.in_backward():
                    done = evaluate(
                        averaged(closure),
                        gradients=True,
                        first_order=self._parameters,
                        look=bystanders,
                    )
                self._check_versions()
                self.reached |= any(p.grad is not None for p in self._parameters)
                if not (self.reached or (self._may_miss and isinstance(done.returned, Tensor))):
                    raise no_graph(done.returned)
                if done.scaled:
                    raise scaled()
                for mean, p in zip(total, self._parameters, strict=True):
                    if p.grad is not None:
                        g = p.grad.to_dense() if p.grad.is_sparse else p.grad
                        mean.add_(g.detach(), alpha=share)
            finally:
                bystanders.put_back()
                for p in self._parameters:
                    p.grad = None
            loss += share * float(done.loss)
            self.evaluations += 1
        self._check(total)
        return total, loss

    def _graph(self) -> tuple[list[Tensor], float]:
        """The same with a graph of the gradient itself."""
        losses = []
        for closure in self._closures:
            self._random.restore()
            torch.clear_autocast_cache()
            watch = ClosureWatch(swallow=False, inner=frozenset(), answer=None, look=None)
            try:
                with (
                    torch.enable_grad(),
                    NoBackward(),
                    watch,
                    interruptible(),
                ):
                    returned = averaged(closure)()
                loss = scalar_loss(returned)
                self._check_versions()
                check_graph(loss)
                ours = {id(p) for p in self._parameters}
                leaves = {id(getattr(node, "variable", loss)) for node in nodes(loss)} | {id(loss)}
                self.reached |= loss.requires_grad and bool(ours & leaves)
                if not (self.reached or (self._may_miss and isinstance(returned, Tensor))):
                    raise no_graph(returned)
                if watch.unscaled(loss) is not loss or watch.holds_a_scale(loss):
                    raise scaled()
            finally:
                watch.stop()
                torch.set_grad_enabled(False)
            losses.append(loss)
            self.evaluations += 1
        if not self.reached:
            self._differentiable = [torch.zeros_like(p) for p in self._parameters]
            return self._differentiable, sum(float(loss) for loss in losses) / len(losses)
        with torch.enable_grad(), interruptible():
            mean = torch.stack([loss.reshape(()) for loss in losses]).mean()
            self._differentiable = list(
                torch.autograd.grad(
                    mean, self._parameters, create_graph=True, materialize_grads=True
                )
            )
        found = [g.detach() for g in self._differentiable]
        self._check(found)
        return found, float(mean)

    def _check_repeats(self) -> None:
        """One that draws another batch each time would be measured as curvature."""
        loss = 0.0
        for closure in self._closures:
            self._random.restore()
            with self._buffers.as_before():
                again = evaluate(averaged(closure), gradients=False).loss
            loss += float(again) / len(self._closures)
        if abs(loss - self.loss) > _SAME * max(1.0, abs(self.loss)):
            raise RuntimeError(
                f"closure must give the same loss at the same weights, got {self.loss:.6g} and "
                f"{loss:.6g}: take the batch before (batch = next(iterator)), not in the closure, "
                "and draw random numbers from the global generators, which are replayed"
            )

    def _restore(self) -> None:
        for p, kept in zip(self._parameters, self._kept, strict=True):
            p.copy_(kept)

    def _check_versions(self) -> None:
        if [p._version for p in self._every] != self._versions:
            self._restore()
            raise RuntimeError(
                "closure must not write parameters, as optimizers, max_norm of embeddings and "
                "weight tying by copies do: then the loss at displaced weights is another's"
            )

    def _check(self, gradient: Sequence[Tensor]) -> None:
        for name, g in zip(self._tensors, gradient, strict=True):
            if not bool(g.isfinite().all()):
                raise FloatingPointError(
                    f"closure must give finite gradients, got one that is not, of {name!r}"
                )


def check_step(step: Any) -> None:
    """Raise ValueError where it is neither None nor a finite number > 0."""
    number = isinstance(step, (int, float)) and not isinstance(step, bool)
    if step is not None and not (number and 0 < step < math.inf):
        raise ValueError(f"step must be a finite number > 0 or None, got {step!r}")


def _put_back(p: Tensor, required: bool, gradient: Tensor | None) -> None:
    p.requires_grad_(required)
    p.grad = gradient
