"""Whether a closure computes in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DEVICES = ("cpu", "cuda")
_SHORT = (torch.float16, torch.bfloat16)


class SeeingShort(TorchFunctionMode):
    """Looks whether torch functions give 16-bit results, or are called under autocast.

    Then losses and gradients at near weights differ by rounding: also where the weights that are
    displaced have 32 bits, as an adapter's in a 16-bit model.
    """

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        short = isinstance(found, Tensor) and found.dtype in _SHORT
        self.seen |= short or any(map(torch.is_autocast_enabled, _DEVICES))
        return found
