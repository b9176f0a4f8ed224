"""A model that is as it was where it was to be changed, and could not be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from zofo_kernels import uninterrupted
from zofo_kernels.memory import has_memory


@contextmanager
def as_before_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises, ``model`` is as before: modules, hooks, attributes, flags, configs.

    Its tensors have the memory that they had, and their ``.grad``; what the block has written to
    that memory stays written. Signals wait until the block is done.
    """
    tensors = [*model.parameters(), *model.buffers()]
    flags = [(t, t.requires_grad, t.grad) for t in tensors if t.is_leaf]
    memory = [(t, t.data, _place(t)) for t in tensors if t.is_meta or has_memory(t)]
    owners: list[Any] = [*model.modules(), *_configs(model)]
    before = [(owner, dict(vars(owner)), _contents(owner)) for owner in owners]
    with uninterrupted():
        try:
            yield
        except BaseException:
            for owner, attributes, contents in before:
                _refill(vars(owner), attributes)
                for name, content in contents.items():
                    _refill(attributes[name], content)
            for tensor, data, place in memory:
                if _place(tensor) != place:
                    tensor.data = data
            for tensor, flag, gradient in flags:
                tensor.requires_grad_(flag)
                tensor.grad = gradient
            raise


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where its elements are."""
    return 0 if tensor.is_meta else tensor.data_ptr(), tensor.shape, tensor.stride()


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
