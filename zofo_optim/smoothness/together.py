"""Closures of micro-batches as one, added up as the optimizer does, and how often they ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..evaluation import Closure, losses_of_examples
from .seeing import SeeingShort

NARROW = (torch.float16, torch.bfloat16)
"""In which gradients and losses at near points differ by rounding."""


class Together:
    """A closure whose loss is the sum of those of several; runs of each are counted.

    Args:
        closure: one, or several.
        of_examples: they return losses of examples, shape (B,); the sum is that of their means,
            and losses are put in a row, scaled so that their mean is that sum.

    Raises:
        TypeError: it is no function, nor a sequence of them.
    """

    def __init__(self, closure: Closure | Sequence[Closure], *, of_examples: bool = False) -> None:
        found: Any = [closure] if callable(closure) else closure
        if not isinstance(found, (list, tuple)) or not found or not all(map(callable, found)):
            raise TypeError(
                f"closure must be a function or a sequence of them, got {closure!r:.80}"
            )
        self._of_examples = of_examples
        self.evaluations = 0
        """Runs of a closure without gradients."""
        self.gradients = 0
        """Runs with gradients."""
        self.narrow = False
        """Whether the first run computed in 16 bits."""
        self.closures = [self._counted(one) for one in found]

    def _counted(self, closure: Closure) -> Callable[[], Any]:
        def counted() -> Any:
            if torch.is_grad_enabled():
                self.gradients += 1
            else:
                self.evaluations += 1
            if self.evaluations + self.gradients > 1:
                return closure()
            with SeeingShort() as seeing:
                returned = closure()
            self.narrow = seeing.seen
            return returned

        return counted

    def __call__(self) -> Any:
        returned = [closure() for closure in self.closures]
        if len(returned) == 1:
            return returned[0]
        if self._of_examples:
            each = [losses_of_examples(losses) for losses in returned]
            total = sum(map(len, each))
            return torch.cat([losses * (total / len(losses)) for losses in each])
        return sum(returned)
