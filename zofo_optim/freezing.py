"""What of a model takes no gradient: all of it, or its zeroth-order parameters in a step."""

from __future__ import annotations

import re
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_LEFT_OUT: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()
"""By model: names of what did not require gradients before a trainer froze the rest."""


def patterns_of_frozen(model: nn.Module) -> list[str]:
    """Freeze the model; patterns of what does not train, where something else does.

    A model that was frozen here before trains as it did then.

    Raises:
        ValueError: an adapter trains.
    """
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    if trains and any(hasattr(module, "peft_config") for module in model.modules()):
        raise ValueError(
            "model must not have an adapter that trains, as a score has no gradients, got "
            f"{trains[0]!r}: freeze it (model.requires_grad_(False)) or merge it "
            "(model.merge_and_unload()), and the base model's weights are trained"
        )
    if trains:
        _LEFT_OUT[model] = [n for n, p in model.named_parameters() if not p.requires_grad]
        model.requires_grad_(False)
    return [f"^{re.escape(name)}$" for name in _LEFT_OUT.get(model, ())]


def freeze(parameters: Iterable[Tensor]) -> None:
    """Let these leaves require no gradients, and lose those that they have."""
    for p in parameters:
        p.requires_grad_(False)
        p.grad = None


@contextmanager
def without_graph(parameters: Iterable[Tensor], check: bool = False) -> Generator[None, None, None]:
    """Autograd computes no gradient for these in here, and keeps nothing for it.

    Args:
        parameters: leaves.
        check: whether something needs them to have a graph.

    Raises:
        RuntimeError: a re-entrant checkpoint does: without, it has no gradients for what is in it.
    """
    switched = [p for p in parameters if p.requires_grad and p.is_leaf]
    for p in switched:
        p.requires_grad_(False)
    try:
        with _reentrant_checkpoints_refused() if check and switched else nullcontext():
            yield
    finally:
        for p in switched:
            p.requires_grad_(True)


@contextmanager
def _reentrant_checkpoints_refused() -> Generator[None, None, None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "None of the inputs have requires_grad=True", UserWarning)
        try:
            yield
        except UserWarning as warning:
            raise RuntimeError(
                "closure must not checkpoint first-order layers with use_reentrant=True above "
                "zeroth-order ones, where no input requires a gradient, so that theirs would be "
                "left out; take use_reentrant=False, or let the input require gradients "
                "(model.enable_input_require_grads() in transformers)"
            ) from warning
