"""An optimizer to try steps with, beside the one that trains."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

from torch import Tensor

from ..advice import Advice
from ..estimate import Accumulation
from ..monitor import Monitor
from ..moves import Moves
from ..optimizer import HybridZOFO


def trial_of(optimizer: HybridZOFO, mode: str) -> HybridZOFO:
    """One with the same weights, and copies of settings, state and the groups of a mode.

    It steps as ``optimizer`` would with these groups alone, and changes nothing of it; nobody
    listens to it. Weights, gradients and buffers are the model's own.
    """
    advice = Advice()
    groups = [
        {
            **copy.deepcopy({k: v for k, v in group.items() if k != "params"}),
            "params": [*group["params"]],
        }
        for group in optimizer.param_groups
        if group["mode"] == mode
    ]
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for group in groups:
        for p in group["params"]:
            if p in optimizer.state:
                state[p] = copy.deepcopy(optimizer.state[p])
    trial = type(optimizer).__new__(type(optimizer))
    trial.__setstate__(
        {
            **optimizer.__getstate__(),
            "param_groups": groups,
            "state": state,
            "_fo": optimizer._fo.fresh(),
            "_accumulation": Accumulation(),
            "_advice": advice,
            "_monitor": Monitor(advice),
            "_moves": Moves(),
        }
    )
    trial._evaluator.buffers = optimizer.buffers
    return trial
