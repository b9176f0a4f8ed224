"""A model that gets an adapter wholly or not at all, and its embeddings' gradients meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..evaluation import GlobalRandomState
from ..intact import as_before_on_error
from ..modes import undisturbed


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If the block raises, ``model`` is as before: modules, hooks, attributes, flags, configs.

    No parameter of it requires gradients in the block, nor afterwards, if that ends well. Weights
    are not copied, as who adds an adapter writes none of the model's. Signals wait until
    the block is done. Random generators are as before in any case: an adapter that is overwritten
    at once has drawn its first weights.
    """
    generators = GlobalRandomState({p.device for p in model.parameters()})
    with undisturbed(), as_before_on_error(model):
        try:
            model.requires_grad_(False)
            yield
        finally:
            generators.restore()


def without_input_gradients(model: nn.Module) -> bool:
    """Take off the hook by which embeddings require gradients, and with them the whole model.

    transformers adds it where activations are checkpointed, and so does peft.

    Returns:
        Whether there was one.
    """
    hooks = ("_require_grads_hooks", "_require_grads_hook")  # transformers 5, 4
    there = any(vars(model).get(name) for name in hooks)
    if there:
        disable: Any = getattr(model, "disable_input_require_grads")  # noqa: B009
        disable()
    return there


@contextmanager
def input_gradients_off(model: nn.Module) -> Iterator[None]:
    """The same in here alone."""
    there = without_input_gradients(model)
    try:
        yield
    finally:
        if there:
            enable: Any = getattr(model, "enable_input_require_grads")  # noqa: B009
            enable()
