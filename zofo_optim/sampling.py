"""Sampling in which the examples that are compared draw the same noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .groups_and_state import GroupsAndState

_DRAWS = {torch.multinomial, Tensor.multinomial}


class common_noise(TorchFunctionMode):  # a context manager, such as torch.no_grad
    """``torch.multinomial`` draws with the same noise on both sides of a direction.

    For a closure that samples, in ``generate(do_sample=True)`` or by itself, with
    ``estimator="antithetic"``: the two examples of a pair then differ by what the displacement
    does to their probabilities, and no longer by luck. Each row by itself is drawn from its
    probabilities as ever, by an exponential race (Gumbel's trick): the element with the largest
    p / e, where the e are exponential. It comes after temperature, top-k, top-p and whatever else
    makes the probabilities.

    Draws of several elements, of numbers of rows that are no multiple of pairs, or from a generator
    of their own, are left as they are.

    Args:
        optimizer: whose settings say which examples are pairs.
        rows: of the batch, for each example that the closure returns a score of, such as
            ``num_return_sequences`` whose mean is taken.

    Raises:
        ValueError: its estimator has no pairs, ``rows`` is no int >= 1; or, while it draws,
            probabilities that are none (on the CPU).

    Example:
        >>> def closure():
        ...     with common_noise(optimizer):
        ...         tokens = model.generate(**prompts, do_sample=True)
        ...     return scores_of(tokens)
    """

    def __init__(self, optimizer: GroupsAndState, *, rows: int = 1) -> None:
        super().__init__()
        settings = optimizer.settings
        if settings.sides == 1:
            raise ValueError(
                "optimizer must have estimator='antithetic', whose examples are in pairs, got "
                f"{settings.estimator!r}"
            )
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ValueError(f"rows must be an int >= 1, got {rows!r}")
        self._each = settings.examples_per_direction * rows

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS and self._is_of_pairs(*args, **kwargs):
            return self._drawn(*args, **kwargs)
        return func(*args, **kwargs)

    def _is_of_pairs(
        self, input: Tensor, num_samples: int, replacement: bool = False, **options: Any
    ) -> bool:
        one = num_samples == 1 and not any(value is not None for value in options.values())
        return one and input.dim() == 2 and len(input) % (2 * self._each) == 0

    def _drawn(self, input: Tensor, *_: Any, **options: Any) -> Tensor:
        """An element a row, shape (B, 1)."""
        if input.device.type == "cpu" and not ((input >= 0) & input.isfinite()).all():
            raise ValueError("probabilities must be finite and >= 0, got others: an overflow?")
        sides = input.reshape(-1, 2, self._each, input.shape[1])
        noise = torch.empty_like(sides[:, :1], dtype=torch.float32).exponential_()
        return (sides / noise).argmax(-1).view(-1, 1)
