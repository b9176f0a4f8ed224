"""Memory that cannot be had, for tests."""

import torch
from torch.overrides import TorchFunctionMode


class FailAt(TorchFunctionMode):
    """After the n-th torch call that makes a tensor, which is lost."""

    def __init__(self, place, error=torch.OutOfMemoryError):
        super().__init__()
        self.place, self.error = place, error

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.place -= isinstance(result, torch.Tensor)
        if self.place == 0:
            self.place = -1
            raise self.error("at this call")
        return result
