"""Steps inside CUDA graphs: what replays must find on the device, and what cannot be replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .zo_groups import ZOGroup

_DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
}


def capturing() -> bool:
    """Whether what is launched now is captured in a CUDA graph instead of run."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def check_replayable(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise for a torch call that draws random numbers: evaluations must share their draws.

    Outside graphs the generators' state is set back before each evaluation; a graph's
    generators cannot be.

    Raises:
        RuntimeError: dropout in training.
    """
    if func in _DROPOUTS:
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", args[2] if len(args) > 2 else True)
        draws = training and p > 0
    elif func is F.scaled_dot_product_attention:
        draws = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0
    else:
        return
    if draws:
        raise RuntimeError(
            f"closure must not use {func.__name__} while a CUDA graph is captured: its draws "
            "would differ between the evaluations of a step; set dropout to 0 or call "
            "model.eval()"
        )


def counters(*size: int, device: torch.device | str, **options: Any) -> Tensor:
    """int64 zeros that later steps write in place, in inference mode or out of it."""
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=torch.int64, device=device, **options)


class StepCounters:
    """The ZO groups' ``zo_step`` as tensors on the device, for ``capturable=True``.

    A captured step reads its directions' step from there and advances it, so that every replay
    has its own directions. The tensors stay the same when a state dict is loaded.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def attach(self, groups: Sequence[ZOGroup]) -> None:
        """Make every group's ``zo_step`` a 0-dim int64 tensor on the device of its parameters.

        Raises:
            ValueError: a group's parameters are on several devices.
            RuntimeError: first called while a graph is captured.
        """
        for position, group in enumerate(groups):
            devices = {p.device for p in group.params}
            if len(devices) > 1:
                raise ValueError(
                    "params of a zeroth-order group must be on one device where "
                    f"capturable=True, got {sorted(map(str, devices))}"
                )
            step = group.options["zo_step"]
            for device in devices:
                if isinstance(step, Tensor) and step.device == device:
                    self._kept[position] = step
                    continue
                if capturing():
                    raise RuntimeError(
                        "run a few steps before capturing one in a CUDA graph, as for any "
                        "optimizer: its state is made in the first"
                    )
                kept = self._kept.get(position)
                if kept is None or kept.device != device:
                    kept = counters(device=device)
                    self._kept[position] = kept
                group.options["zo_step"] = kept.fill_(int(step))


def check_capture(capturable: bool, groups: Sequence[ZOGroup], counters: StepCounters) -> None:
    """Attach the counters where steps are capturable; refuse to capture others.

    Raises:
        RuntimeError: a graph is being captured, and ``capturable`` is False.
        ValueError: see :meth:`StepCounters.attach`.
    """
    if capturable:
        counters.attach(groups)
    elif groups and capturing():
        raise RuntimeError(
            "every replay of a CUDA graph would perturb along the same direction; construct "
            "HybridZOFO with capturable=True to capture its steps"
        )
