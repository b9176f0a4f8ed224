"""That a model has no gradient, checked while it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class GraphError(RuntimeError):
    """A graph was built where none may be; the message says of what."""


@contextmanager
def no_graph(model: nn.Module) -> Iterator[None]:
    """Nothing in the block saves a tensor for a backward; the model has no gradient afterwards.

    Raises:
        GraphError: something does; or a parameter of the model requires, or has, a gradient, before
            the block or after it.
    """

    def saved(tensor: Tensor) -> Any:
        raise GraphError(f"a tensor of shape {tuple(tensor.shape)} was saved for a backward")

    _check(model)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda kept: kept):
        yield
    _check(model)


def _check(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or parameter.grad is not None:
            raise GraphError(f"{name} requires a gradient, or has one")
