"""What measurements refuse of closures, and closures that call backward themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .bystanders import nodes


def no_graph(returned: Any) -> TypeError:
    kind = type(returned).__name__
    return TypeError(
        f"closure must return the loss as a tensor with a graph to the parameters, got {kind}"
        + (" without one to these" if isinstance(returned, Tensor) else f" {returned!r:.80}")
    )


def check_graph(loss: Tensor) -> None:
    """Re-entrant checkpointing hides the layers from double backward, which would give 0."""
    for node in nodes(loss):
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise TypeError(
                "closure must not use re-entrant checkpointing where method='exact', which has no "
                "second derivative: take use_reentrant=False, or method='finite_difference'"
            )


def scaled() -> ValueError:
    return ValueError("closure must return the loss itself, got one that a GradScaler scaled")


class NoBackward(TorchFunctionMode):
    """Closures that call backward themselves leave the graph whole."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.backward or func is torch.autograd.backward:
            return None
        return func(*args, **(kwargs or {}))
