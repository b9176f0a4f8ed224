"""A model that is as it was where it was to be changed, and could not be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..evaluation import GlobalRandomState
from ..modes import undisturbed


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If the block raises, ``model`` is as before: modules, hooks, attributes, flags, config.

    Weights are not copied, as who adds an adapter writes none of the model's. Signals wait until
    the block is done. Random generators are as before in any case: an adapter that is overwritten
    at once has drawn its first weights.
    """
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    owners: list[Any] = [*model.modules()]
    if hasattr(model, "config"):
        owners.append(model.config)
    before = [(owner, dict(vars(owner)), _contents(owner)) for owner in owners]
    generators = GlobalRandomState({p.device for p in model.parameters()})
    with undisturbed():
        try:
            yield
        except BaseException:
            for owner, attributes, contents in before:
                _refill(vars(owner), attributes)
                for name, content in contents.items():
                    _refill(attributes[name], content)
            for p, flag, grad in flags:
                p.requires_grad_(flag)
                p.grad = grad
            raise
        finally:
            generators.restore()


def _contents(owner: Any) -> dict[str, Any]:
    """Copies of what an object holds by mutable attributes, such as its hooks."""
    return {n: v.copy() for n, v in vars(owner).items() if isinstance(v, dict | set)}


def _refill(holder: Any, content: Any) -> None:
    holder.clear()
    holder.update(content)


def without_input_gradients(model: nn.Module) -> None:
    """Take off the hook by which embeddings require gradients, and with them the whole model.

    transformers adds it where activations are checkpointed, and so does peft.
    """
    disable: Any = getattr(model, "disable_input_require_grads", None)
    if disable is not None:
        disable()
