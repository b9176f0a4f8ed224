"""First-order updates inside the backward: each gradient is applied and freed as it comes.

So that a first-order part stores no gradients but the largest one (LOMO, Lv et al. 2023; torch's
own recipe, by its hooks). Nothing can look at all gradients before the first weight is written.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import Tensor

from zofo_kernels import uninterrupted
from zofo_kernels._torch_compat import without_torch_functions

from .first_order import FirstOrder

REFUSED = (
    "backward(closure) must not be called where optimizer_in_backward=True, which keeps no "
    "gradients for a later step() to accumulate, clip or look at; call step(closure)"
)

OF_SEVERAL = (
    "optimizer_in_backward must be False where several processes train together: gradients come in "
    "the backward before they are averaged over processes"
)


class InBackward:
    """Applies first-order gradients while one evaluation is back-propagated.

    The first evaluation with gradients is a trial that writes nothing: it shows whether each
    parameter gets its gradient in one part, and the closure looks at none.

    Args:
        first_order: steps them one by one.
    """

    def __init__(self, first_order: FirstOrder) -> None:
        self._first_order = first_order
        self._tried: list[tuple[Tensor, bool]] = []
        self._watched: set[int] = set()  # by id, while an evaluation with gradients goes on
        self._began = self._trial = False

    def is_tried(self, parameters: Sequence[Tensor]) -> bool:
        """Whether a trial has shown that these may be updated so."""
        return len(parameters) == len(self._tried) and all(
            p is q and p.requires_grad is trains
            for p, (q, trains) in zip(parameters, self._tried, strict=True)
        )

    @contextmanager
    def updating(self, parameters: Sequence[Tensor]) -> Generator[None, None, None]:
        """Apply, or in a trial drop, the gradient of each when it comes, and free it.

        Raises:
            RuntimeError: one holds a gradient already, gets one in several parts, or has one that
                no backward left.
        """
        if any(p.grad is not None for p in parameters):
            raise RuntimeError(
                "first-order parameters must have no gradients where optimizer_in_backward=True, "
                "as theirs are not accumulated: call zero_grad() before step(closure)"
            )
        trial = self._trial = not self.is_tried(parameters)
        came: set[int] = set()
        steps = {} if trial else self._first_order.steps_of_one()

        def comes(p: Tensor) -> None:
            if id(p) in came:
                p.grad = None
                raise RuntimeError(_in_parts(f"a parameter of shape {tuple(p.shape)}", trial))
            came.add(id(p))
            if not trial:
                with uninterrupted(), without_torch_functions():
                    steps[id(p)](p)
            p.grad = None

        trains = [p for p in parameters if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(comes) for p in trains]  # type: ignore[no-untyped-call]
        self._watched, self._began = {id(p) for p in trains}, False
        try:
            yield
        finally:
            self._watched = set()
            for hook in hooks:
                hook.remove()
        if left := [p for p in parameters if p.grad is not None]:
            for p in left:
                p.grad = None
            raise RuntimeError(
                "closure must leave gradients by backward alone where optimizer_in_backward=True, "
                f"got {len(left)} first-order parameters whose .grad was set in another way"
            )
        if trial:
            self._tried = [(p, p.requires_grad) for p in parameters]

    def look(self, root: Tensor, scaled: bool) -> None:
        """At what is about to be back-propagated: afterwards nothing can be taken back.

        Raises:
            FloatingPointError: it is a loss that is not finite.
            RuntimeError: it has a GradScaler's scale, which is taken off gradients after the
                backward; or it is the second one.
        """
        if scaled:
            raise RuntimeError(
                "closure must not scale its loss by a GradScaler where optimizer_in_backward=True, "
                "which updates before gradients can be unscaled; use bfloat16, which needs no "
                "scaler"
            )
        if root.numel() == 1:
            look_at(root)
        if self._began:
            raise RuntimeError(_in_parts("the model", self._trial))
        self._began = True

    def looked_at(self, parameter: Tensor) -> None:
        """A closure reads a parameter's ``.grad``, perhaps to clip it.

        Raises:
            RuntimeError: after its backward.
        """
        if self._began and id(parameter) in self._watched:
            raise RuntimeError(
                "closure must not look at gradients after its backward where "
                "optimizer_in_backward=True: they are applied and gone (clipping inside a closure, "
                "as Lightning's gradient_clip_val does, would do nothing)"
            )


def _in_parts(what: str, trial: bool) -> str:
    return (
        "closure must call backward once, for its loss, where optimizer_in_backward=True, but "
        f"{what} gets gradients in several parts: by several calls of backward, a backward that "
        "the loss depends on, or checkpointing with use_reentrant=True"
        + ("" if trial else "; parameters whose gradients came before are updated")
    )


def look_at(loss: Tensor) -> None:
    """
    Raises:
        FloatingPointError: a loss is not finite.
    """
    if not loss.isfinite().all():
        raise FloatingPointError(
            f"closure must return finite losses (nonfinite='raise'), got {loss.tolist()}"
        )
