"""What a first-order optimizer takes off the weights at unit rate."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..groups_and_state import GroupsAndState
from ..smoothness.vectors import norm
from .measured import relative_rates

WARM = 30
"""Trial steps of the copy, at rate 0, before the one that is looked at."""
_OTHERS = (1, 300)
"""Steps after which updates of an optimizer that may be no moving average are looked at as well."""
_LARGER = 2.5
"""An update is so many times larger by more than the noise of 4 batches."""
_AVERAGES = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def trial_update(
    optimizer: GroupsAndState, params: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]
) -> tuple[list[Tensor], int, float]:
    """What ``fo_optimizer`` takes off the weights at unit rate, once its averages are filled.

    Of copies in at least single precision, with copies of its state; the rates of groups keep
    their ratios, and the largest is 1. With the optimizer's ``coupling`` gradients are
    1 + coupling times as large.

    Returns:
        The update, the step that it is of, and how much larger it is than after WARM steps.

    Raises:
        ValueError: a group has no rate, or the update is not finite, is 0, or has no regard to the
            rate.
    """
    update = _update_after(WARM, optimizer, params, gradients)
    usual = largest = norm(update)
    step = WARM
    if not any(optimizer._fo.makes(known) for known in _AVERAGES):
        for other in _OTHERS:
            found = _update_after(other - 1, optimizer, params, gradients)
            if norm(found) > max(_LARGER * usual, largest):
                update, step, largest = found, other, norm(found)
    return update, step, largest / usual


def _update_after(
    steps: int,
    optimizer: GroupsAndState,
    params: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
) -> list[Tensor]:
    """The update that follows so many steps at rate 0."""
    groups = [g for g in optimizer.param_groups if g["mode"] == "fo" and g["params"]]
    relative, _ = relative_rates(groups)
    weight = 1 + (optimizer.settings.coupling if optimizer.zo_groups() else 0.0)
    precise = [torch.promote_types(p.dtype, torch.float32) for p in params]
    shadows = {
        p: p.detach().to(dtype, copy=True).requires_grad_()
        for p, dtype in zip(params, precise, strict=True)
    }
    trial_groups: list[dict[str, Any]] = [
        {**group, "params": [shadows[p] for p in group["params"]], "lr": 0.0} for group in groups
    ]
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for p, shadow in shadows.items():
        if p in optimizer.state:
            state[shadow] = copy.deepcopy(optimizer.state[p])
    trial = optimizer._fo.fresh()
    trial.rebuild(trial_groups, state)
    before = [shadow.detach().clone() for shadow in shadows.values()]
    for step in range(steps + 1):
        if step == steps:
            if any(not torch.equal(b, s) for b, s in zip(before, shadows.values(), strict=True)):
                raise ValueError(
                    "fo_optimizer must not move weights at rate 0, so that its updates grow with "
                    f"the rate, got {optimizer._fo.name}, which does: no rate can be measured"
                )
            for group, rate in zip(trial_groups, relative, strict=True):
                group["lr"] = rate
        for shadow, gradient in zip(
            shadows.values(), gradients[step % len(gradients)], strict=True
        ):
            shadow.grad = gradient.to(shadow.dtype, copy=True).mul_(weight)
        trial.step()
    update = [b - s.detach() for b, s in zip(before, shadows.values(), strict=True)]
    size = norm(update)
    if not 0 < size < math.inf:
        raise ValueError(
            f"fo_optimizer must step by a finite update that is not 0, got one of norm {size} at "
            "rate 1"
        )
    return update
