"""Which tensors may train first-order, and setting ``requires_grad`` for a while."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from zofo_kernels._torch_compat import is_wrapper_subclass


def candidates_of(model: nn.Module, parameters: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Tensors that may train, by name, each once.

    Args:
        model: a module.
        parameters: the candidates; None: the parameters with ``requires_grad=True``, or all of
            floating point where none has.

    Raises:
        TypeError: ``model`` is no module, or has weights that hold others in place of data; a
            candidate is no leaf tensor of real numbers.
        ValueError: there is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, p in model.named_parameters():
        if is_wrapper_subclass(p):
            raise TypeError(
                "model must have plain weights for its costs to be counted, got "
                f"{type(p).__name__} (sharded or quantised) in {name!r}"
            )
    if parameters is None:
        every = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        found: dict[str, Any] = {n: p for n, p in every.items() if p.requires_grad} or every
    else:
        found = dict(parameters)
    once: dict[int, tuple[str, Tensor]] = {}
    for name, p in found.items():
        if not isinstance(p, Tensor) or not p.is_floating_point() or not p.is_leaf:
            kind = f"{p.dtype}, with a graph" if isinstance(p, Tensor) else type(p).__name__
            raise TypeError(
                f"parameters must be leaf tensors of real numbers, got {name!r}, of {kind}"
            )
        once.setdefault(id(p), (name, p))
    if not once:
        raise ValueError("model must have a parameter that may train, got none")
    return dict(once.values())


@contextmanager
def requiring(model: nn.Module, tensors: Mapping[str, Tensor]) -> Generator[None, None, None]:
    """In the block these tensors require gradients, and no other parameter of the model does.

    No parameter has a ``.grad`` there, so that closures may clear them; after it all is as before.
    """
    every = {id(p): p for p in (*model.parameters(), *tensors.values())}
    before = [(p, p.requires_grad, p.grad) for p in every.values()]
    wanted = {id(p) for p in tensors.values()}
    try:
        for key, p in every.items():
            p.requires_grad_(key in wanted)
            p.grad = None
        yield
    finally:
        for p, required, gradient in before:
            p.requires_grad_(required)
            p.grad = gradient
