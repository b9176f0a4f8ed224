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


class InBackward:
    """Applies first-order gradients while one evaluation is back-propagated.

    The first evaluation with gradients is a trial that writes nothing: it shows whether each
    parameter gets its gradient in one part.

    Args:
        first_order: steps them one by one.
    """

    def __init__(self, first_order: FirstOrder) -> None:
        self._first_order = first_order
        self._tried: list[Tensor] = []

    def is_tried(self, parameters: Sequence[Tensor]) -> bool:
        """Whether a trial has shown that these may be updated so."""
        known = zip(parameters, self._tried, strict=False)
        return len(parameters) == len(self._tried) and all(p is q for p, q in known)

    def forget(self) -> None:
        """Try again next time."""
        self._tried = []

    @contextmanager
    def updating(self, parameters: Sequence[Tensor]) -> Generator[None, None, None]:
        """Apply, or in a trial drop, the gradient of each when it comes, and free it.

        Raises:
            RuntimeError: one holds a gradient already, or gets one in several parts.
        """
        if any(p.grad is not None for p in parameters):
            raise RuntimeError(
                "first-order parameters must have no gradients where optimizer_in_backward=True, "
                "as theirs are not accumulated: call zero_grad() before step(closure)"
            )
        trial = not self.is_tried(parameters)
        came: set[int] = set()

        def comes(p: Tensor) -> None:
            if id(p) in came:
                p.grad = None
                raise RuntimeError(
                    "a first-order parameter of shape "
                    f"{tuple(p.shape)} must get its gradient in one part where "
                    "optimizer_in_backward=True, and got it in several: by several calls of "
                    "backward, or by checkpointing with use_reentrant=True"
                    + ("" if trial else "; parameters whose gradients came before are updated")
                )
            came.add(id(p))
            if not trial:
                with uninterrupted(), without_torch_functions():
                    self._first_order.step_one(p)
            p.grad = None

        trains = [p for p in parameters if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(comes) for p in trains]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if trial:
            self._tried = list(parameters)


def look_at(loss: Tensor, scaled: bool = False) -> None:
    """Before a backward that updates: afterwards nothing can be taken back.

    Raises:
        FloatingPointError: the loss is not finite.
        RuntimeError: it has a GradScaler's scale, which is taken off gradients after the backward.
    """
    if scaled:
        raise RuntimeError(
            "closure must not scale its loss by a GradScaler where optimizer_in_backward=True, "
            "which updates before gradients can be unscaled; use bfloat16, which needs no scaler"
        )
    if not loss.isfinite().all():
        raise FloatingPointError(
            f"closure must return finite losses (nonfinite='raise'), got {loss.tolist()}"
        )
