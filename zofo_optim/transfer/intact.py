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
    """If the block raises, ``model`` is as before: modules, hooks, attributes, flags, configs.

    No parameter of it requires gradients in the block, nor afterwards, if that ends well. Weights
    are not copied, as who adds an adapter writes none of the model's. Signals wait until
    the block is done. Random generators are as before in any case: an adapter that is overwritten
    at once has drawn its first weights.
    """
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    owners: list[Any] = [*model.modules(), *_configs(model)]
    before = [(owner, dict(vars(owner)), _contents(owner)) for owner in owners]
    generators = GlobalRandomState({p.device for p in model.parameters()})
    with undisturbed():
        try:
            model.requires_grad_(False)
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


def _configs(owner: Any) -> list[Any]:
    """The configs that an object has, and those within them, such as one of the text's part."""
    own = [value for value in vars(owner).values() if hasattr(value, "to_diff_dict")]
    return [*own, *(inner for config in own for inner in _configs(config))]


def _contents(owner: Any) -> dict[str, Any]:
    """Copies of what an object holds by mutable attributes, such as its hooks."""
    return {n: v.copy() for n, v in vars(owner).items() if isinstance(v, dict | set | list)}


def _refill(holder: Any, content: Any) -> None:
    if isinstance(holder, list):
        holder[:] = content
    else:
        holder.clear()
        holder.update(content)


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
