"""Evaluating a loss closure: gradients or none, replayed randomness, a checked result."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from zofo_kernels import interruptible

from . import parallel
from .buffers import Buffers
from .capture import capturing
from .frameworks import may_skip
from .freezing import without_graph
from .gradients import Gradients
from .in_backward import InBackward, look_at
from .replicas import Replicas, Share
from .sharding import whole_of
from .watch import Answer, ClosureWatch, Look, answering

Closure = Callable[[], Any]


class GlobalRandomState:
    """The state of every global generator that a closure may draw from.

    Covers torch's CPU generator, those of all accelerators of the kinds in ``devices``, Python's
    ``random`` and ``numpy.random``. All, since a model may also draw where it has no parameter
    that trains. CUDA devices count where the process has used one.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._accelerators = [
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in _accelerators(devices)
            if not capturing()
        ]
        self._python = random.getstate()
        # the legacy generator is the global one
        self._numpy = np.random.get_state()  # noqa: NPY002

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._accelerators:
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002


def _accelerators(devices: Iterable[torch.device]) -> list[torch.device]:
    """All of the kinds in ``devices``, and of CUDA where it is used."""
    kinds = {device.type for device in devices} - {"cpu", "meta"}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        kinds.add("cuda")
    return [
        torch.device(kind, index)
        for kind in sorted(kinds)
        for index in range(torch.get_device_module(kind).device_count())
    ]


class NoLossError(TypeError):
    """The closure returned None."""


class Evaluation(NamedTuple):
    """One run of the closure."""

    returned: Any
    """What the closure returned."""
    loss: Tensor
    """The same, detached, of at least fp32 and without a GradScaler's scale: 0-dim, or (B,)."""
    backpropagated: bool
    """Whether gradients were taken, by the closure or by us."""
    scaled: bool = False
    """Whether the loss has a GradScaler's scale in it that cannot be taken off."""
    left: bool = False
    """Whether all its calls of backward were such, and left gradients that ours were added to."""
    inner: frozenset[int] = frozenset()
    """Which of the closure's calls of backward its loss depends on; see :class:`ClosureWatch`."""


def evaluate(
    closure: Closure,
    *,
    gradients: bool,
    inner: frozenset[int] = frozenset(),
    first_order: Sequence[Tensor] = (),
    per_example: bool = False,
    answer: Answer | None = None,
    look: Look | None = None,
    share: Share | None = None,
) -> Evaluation:
    """Run the closure once.

    Args:
        closure: returns the loss, as a one-element tensor or a Python number; it may call
            ``backward`` itself, or leave that to us.
        gradients: True for the evaluation that leaves first-order gradients; False runs under
            ``no_grad`` with the closure's own backward calls swallowed.
        inner: calls of backward to make although ``gradients`` is False, under ``enable_grad``,
            as an evaluation with gradients found them.
        first_order: the parameters that gradients are for.
        per_example: the closure returns the losses of B examples, shape (B,); gradients are those
            of their mean.
        answer: makes the results of the closure's torch calls; None: torch does.
        look: is told of what is back-propagated, before.
        share: factor of the gradients, for their mean over processes to be weighted.

    Raises:
        TypeError, ValueError: the closure did not return a real scalar, or such losses; or it
            called backward itself, and shares differ.
    """
    # An autocast block around the step keeps 16-bit copies of weights as they were before.
    torch.clear_autocast_cache()
    watch = ClosureWatch(swallow=not gradients, inner=inner, answer=answer, look=look)
    recording = torch.is_grad_enabled()
    before = [_gradient(p) for p in first_order]
    try:
        with (
            torch.set_grad_enabled(gradients or bool(inner)),
            answering(answer),
            watch,
            interruptible(),
        ):
            returned = closure()
        loss = losses_of_examples(returned) if per_example else scalar_loss(returned)
        calls, plain = watch.calls, watch.unscaled(loss)
        scaled = gradients and watch.holds_a_scale(loss)
        inner = watch.inner_calls(loss) if gradients else inner
    finally:
        # Ctrl-C at the block's edges can skip their own undoing
        watch.stop()
        torch.set_grad_enabled(recording)
    backpropagated = calls > len(inner)
    after = [_gradient(p) for p in first_order] if gradients else before
    changed = zip(first_order, before, after, strict=False)
    taken = backpropagated or any(p.grad is not None and was != now for p, was, now in changed)
    if gradients and per_example and first_order and not (taken or isinstance(returned, Tensor)):
        raise TypeError(
            "closure must return a tensor, or call backward itself: first-order groups need a loss "
            f"with a graph, got {type(returned).__name__}"
        )
    left = calls > 0 and not backpropagated and after != before
    left = left and any(p.grad is not None for p in first_order)
    if backpropagated and gradients and share is not None and share.differ:
        raise ValueError(
            "closure must return the loss and leave backward to the optimizer where weight differs "
            "between processes: the gradients of its own backward are not weighted"
        )
    if gradients and not backpropagated and loss.requires_grad:
        with torch.enable_grad():
            whole = loss.mean() if per_example else loss
            whole = whole if share is None or not share.differ else whole * share.factor
        if look is not None:
            look.look(whole, scaled or plain is not loss)
        with answering(answer), interruptible():
            whole.backward()  # type: ignore[no-untyped-call]
        backpropagated = True
    # a scale is for gradients; a parameter may be the loss itself
    loss = plain.detach() if answer is None else answer(Tensor.detach, (plain,), {})
    loss = whole_of(loss).reshape(-1 if per_example else ())
    # a copy: the closure may return memory that its next run overwrites
    loss = loss.to(torch.promote_types(loss.dtype, torch.float32), copy=True)
    return Evaluation(returned, loss, backpropagated, scaled, left, inner)


def _gradient(p: Tensor) -> tuple[int, int] | None:
    """Changes when somebody adds to it."""
    return None if p.grad is None else (id(p.grad), p.grad._version)


def scalar_loss(returned: Any) -> Tensor:
    """The closure's result as a one-element tensor; see :func:`evaluate` for what it raises."""
    if isinstance(returned, Tensor):
        if returned.numel() != 1:
            raise ValueError(
                "closure must return a scalar loss (one element), got shape "
                f"{tuple(returned.shape)}; reduce it, for example with .mean()"
            )
        if returned.is_complex():
            raise TypeError(f"closure must return a real loss, got dtype {returned.dtype}")
        return returned
    if isinstance(returned, (bool, int, float, np.number, np.bool_)):
        return torch.tensor(float(returned), dtype=torch.float64, device="cpu")
    error = NoLossError if returned is None else TypeError
    raise error(
        "closure must return the loss as a tensor or a number, got "
        f"{type(returned).__name__}; does it end in 'return loss'?"
    )


def losses_of_examples(returned: Any, said: str = "closure must return") -> Tensor:
    """The closure's result as losses, shape (B,); see :func:`evaluate` for what it raises.

    Args:
        returned: by the closure, or given in its place.
        said: how messages begin.
    """
    if isinstance(returned, (list, tuple, np.ndarray)):
        returned = _numbers(returned, said)
    if not isinstance(returned, Tensor):
        error = NoLossError if returned is None else TypeError
        raise error(
            f"{said} the losses or scores of the examples, as a tensor, an array or a "
            f"list of numbers, where directions='per_example', got {type(returned).__name__}"
        )
    if returned.dim() != 1 or returned.numel() == 0:
        raise ValueError(
            f"{said} one loss for each example, shape (B,), where "
            f"directions='per_example', got shape {tuple(returned.shape)}; average over each "
            "example by itself (reduction='none', or zofo_optim.example_losses_of(model, batch))"
        )
    if not returned.is_floating_point():
        raise TypeError(f"{said} real losses, got dtype {returned.dtype}")
    return returned


def _numbers(scores: Any, said: str) -> Tensor:
    """Scores from outside torch, such as a reward function's."""
    if all(isinstance(score, Tensor) and score.dim() == 0 for score in scores):
        return torch.stack([*scores])
    try:
        if any(isinstance(score, Tensor) and score.dim() for score in scores):
            raise TypeError("a tensor of several dimensions is no number")
        found = np.array([float(score) for score in scores], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{said} a number for each example where directions='per_example', got {scores!r:.200}"
        ) from error
    return torch.from_numpy(found)


def averaged(closure: Closure) -> Closure:
    """Losses of examples become their mean."""

    def mean() -> Any:
        loss = closure()
        return loss.mean() if isinstance(loss, Tensor) and loss.dim() == 1 else loss

    return mean


class Runs:
    """The runs of one closure that belong to one estimate; a context manager.

    All runs draw the same random numbers and start from the same buffers. On leaving, generators
    and buffers are as after one run, and first-order gradients are those of the runs that take
    them: see :class:`.gradients.Gradients`.

    Args:
        evaluator: told which run is going on.
        closure: see :func:`evaluate`.
        first_order: parameters with gradients to keep.
        devices: whose generators the closure may draw from; None where it runs once.
        zeroth_order: parameters for which no gradients are computed.
        in_backward: applies the gradients as they come; None: they are left in ``.grad``.
        share: see :func:`evaluate`.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        closure: Closure,
        first_order: Sequence[Tensor],
        devices: Iterable[torch.device] | None,
        zeroth_order: Sequence[Tensor] = (),
        in_backward: InBackward | None = None,
        share: Share | None = None,
    ) -> None:
        self._share = share
        self._evaluator = evaluator
        self._closure = closure
        self._first_order, self._zeroth_order = first_order, zeroth_order
        self._gradients = Gradients(
            () if in_backward else first_order,
            evaluator.replicas,
            lambda: evaluator.calls_ddp,
        )
        self._in_backward = in_backward
        self._devices = None if devices is None else set(devices)
        self._before: GlobalRandomState | None = None
        self._after: GlobalRandomState | None = None
        self._inner: frozenset[int] = frozenset()
        self._began = False
        self._broadcasting: list[Any] = []

    def __enter__(self) -> Runs:
        if self._devices is not None:
            self._before = GlobalRandomState(self._devices)
            self._evaluator.buffers.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        """Restore; and end quietly where the first run says to skip the batch."""
        try:
            self._gradients.put_back()
        finally:
            if self._after is not None:
                self._after.restore()
                self._evaluator.buffers.end()
        return isinstance(error, NoLossError) and self._after is None and may_skip(self._closure)

    def __call__(self, weight: float, answer: Answer | None = None) -> Evaluation:
        """Run the closure once more, with gradients of this weight; see :func:`evaluate`."""
        gradients, updates, evaluator = bool(weight), self._in_backward, self._evaluator
        zeroth_order = self._zeroth_order if gradients or self._inner else ()
        graphless = without_graph(zeroth_order, check=gradients and not evaluator.graph_is_known)
        self._gradients.before_run(weight)
        try:
            self._evaluator.running = "first" if self._after is None else "repeat"
            if self._before is not None and self._began:  # the first one may have failed
                self._before.restore()
                self._evaluator.buffers.rewind()
            self._began = True
            inner = frozenset() if gradients else self._inner
            with (
                self._evaluator.first_of_all(self._zeroth_order, self._devices is not None),
                graphless,
                updates.updating(self._first_order) if gradients and updates else nullcontext(),
            ):
                result = evaluate(
                    self._closure,
                    gradients=gradients,
                    inner=inner,
                    first_order=self._first_order if gradients else (),
                    per_example=self._evaluator.per_example,
                    answer=answer,
                    look=updates if gradients else None,
                    share=self._share,
                )
            if updates and not gradients:
                look_at(result.loss)
            evaluator.graph_is_known |= gradients
            self._inner = result.inner
            self._gradients.after_run(weight, result.loss)
        finally:
            self._evaluator.running = None
            for wrapped in self._broadcasting:  # else a run without gradients ends it
                wrapped.require_forward_param_sync = True
        if self._devices is not None and self._after is None:
            self._broadcasting = evaluator.broadcasting()
            self._after = GlobalRandomState(self._devices)
            self._evaluator.buffers.ran()
        return result


class Evaluator:
    """Runs an optimizer's closures, and tells which run is going on.

    Args:
        per_example: whether they return the losses of examples.
    """

    def __init__(self, per_example: bool = False) -> None:
        self.per_example = per_example
        self.replicas: Replicas | None = None
        """The processes that evaluate along with this one; None: it is alone."""
        self.running: str | None = None
        """While a closure runs, "first" or "repeat": an estimate's first run, or a later one."""
        self.buffers = Buffers()
        self.graph_is_known = False
        """Whether an evaluation with gradients did without those of zeroth-order parameters."""
        self._checked = False
        self._wrapped: parallel.Wrapped = WeakSet()

    @contextmanager
    def first_of_all(
        self, zeroth_order: Sequence[Tensor], has_groups: bool
    ) -> Generator[None, None, None]:
        """Around each run; the first with ZO groups checks how the model is wrapped."""
        if self._checked or not has_groups:
            yield
            return
        processes = 1 if self.replicas is None else self.replicas.size
        with parallel.checked(processes, {id(p) for p in zeroth_order}) as wrapped:
            yield
        self._checked, self._wrapped = True, wrapped

    @property
    def calls_ddp(self) -> bool:
        """Whether closures call a model in DDP, as far as is known."""
        return bool(self._wrapped)

    def broadcasting(self) -> list[Any]:
        """The models in DDP whose next forward pass begins with the first process's buffers."""
        return [model for model in self._wrapped if model.require_forward_param_sync]

    def runs(
        self,
        closure: Closure,
        first_order: Sequence[Tensor],
        devices: Iterable[torch.device] | None,
        zeroth_order: Sequence[Tensor] = (),
        in_backward: InBackward | None = None,
        share: Share | None = None,
    ) -> Runs:
        """What evaluates ``closure`` for one estimate; see :class:`Runs`.

        Raises:
            TypeError: ``closure`` cannot be called.
        """
        if not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}")
        return Runs(self, closure, first_order, devices, zeroth_order, in_backward, share)
