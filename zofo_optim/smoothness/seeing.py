"""Whether a closure computes in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DEVICES = ("cpu", "cuda")


class SeeingAutocast(TorchFunctionMode):
    """Looks whether torch functions are called under autocast, within the closure too."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= any(map(torch.is_autocast_enabled, _DEVICES))
        return func(*args, **(kwargs or {}))
