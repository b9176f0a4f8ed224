"""The first-order rate: where the loss, along the optimizer's own update, stops falling.

The update u of ``fo_optimizer`` at unit rate is that of a copy which has seen the batches'
gradients, over and over, at the weights as they are: so Adam's averages and momentum are filled.
The slope of these batches' loss along -u is phi'(lr) = -grad f(y - lr u) . u, and

    lr* : phi'(lr*) = 0,

the rate of the largest decrease along it; for a quadratic loss it is grad f . u / (u' H u). It is
sought from a small rate on, by doubling, so that curvature is seen at the length of the step: a
network's differs much from that at a point. As for zeroth order, these are the batches of the step
itself: others would say how much of the update is noise, not how long it may be.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..evaluation import Closure, evaluate
from ..groups_and_state import GroupsAndState
from .measured import parameters_of, put_back, relative_rates

WARM = 30
"""Trial steps of the copy, at rate 0, before the one that is looked at."""
BATCHES = 4
"""So many are looked at, at most: the first ones."""
_SMALL = 1e-3
"""Length of the first displacement, over the weights' norm."""
_DOUBLINGS = 40


@dataclass(frozen=True)
class FirstOrder:
    """What was measured along the first-order update."""

    lr: float
    """lr*; NaN where the loss does not fall, or does not turn."""
    slope: float
    """grad f . u at the weights: how fast these batches' loss falls, a unit of rate."""
    slope_error: float
    """Its standard error, over batches; NaN with one."""
    curvature: float
    """u' H u, for a small displacement."""
    loss: float
    batches: int
    evaluations: int
    """With a backward each."""


def measure(optimizer: GroupsAndState, closures: Sequence[Closure]) -> FirstOrder:
    """Of all first-order groups together; see the module. Weights move, and are put back."""
    params = parameters_of(optimizer, "fo")
    count = 0
    with put_back(optimizer, params) as again:

        def gradients(closure: Closure) -> tuple[float, list[Tensor]]:
            nonlocal count
            count += 1
            return _gradients(closure, params)

        some = closures[:BATCHES]
        found, losses = [], []
        for closure in some:
            again()
            loss, gradient = gradients(closure)
            found.append(gradient)
            losses.append(loss)
        update = trial_update(optimizer, params, found)
        start = [-_dot(gradient, update) for gradient in found]
        del found

        falls = sum(start) / len(start)
        small = _SMALL * _norm(params) / _norm(update) if _norm(params) else _SMALL

        def slope_at(rate: float) -> float:
            slopes = []
            for closure in some:
                again()
                with torch.no_grad():
                    for p, u in zip(params, update, strict=True):
                        p.copy_(p - rate * u)
                slopes.append(-_dot(gradients(closure)[1], update))
            return sum(slopes) / len(slopes)

        near = slope_at(small)
        lr = turning(slope_at, falls, small, near)
    spread = torch.tensor(start, dtype=torch.float64)
    error = (spread.std() / len(start) ** 0.5).item() if len(start) > 1 else math.nan
    curvature = (near - falls) / small
    mean = sum(losses) / len(losses)
    return FirstOrder(lr, -falls, error, curvature, mean, len(some), count)


def gradient_norms(
    optimizer: GroupsAndState, closures: Sequence[Closure]
) -> tuple[list[float], float]:
    """Norms of the first-order gradients: of each batch's, and of their mean."""
    params = parameters_of(optimizer, "fo")
    norms, mean = [], [torch.zeros_like(p) for p in params]
    with put_back(optimizer) as again:
        for closure in closures:
            again()
            _, gradient = _gradients(closure, params)
            norms.append(_norm(gradient))
            for total, g in zip(mean, gradient, strict=True):
                total += g / len(closures)
    return norms, _norm(mean)


def turning(slope_at: Callable[[float], float], start: float, small: float, near: float) -> float:
    """The rate at which a slope that begins below 0 comes to it; NaN where it does not.

    Args:
        slope_at: the slope at a rate.
        start: at 0.
        small: a small rate.
        near: the slope there.
    """
    if not start < 0:
        return math.nan
    high, at_high = small, near
    for _ in range(_DOUBLINGS):  # until a straight line from 0 is not far off
        if at_high <= -start:
            break
        high /= 2
        at_high = slope_at(high)
    low, at_low = 0.0, start
    for _ in range(_DOUBLINGS):
        if not at_high < 0:
            break
        low, at_low, high = high, at_high, 2 * high
        at_high = slope_at(high)
    else:
        return math.nan
    if not math.isfinite(at_high):
        return low
    return low + (high - low) * at_low / (at_low - at_high)


def trial_update(
    optimizer: GroupsAndState, params: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """What ``fo_optimizer`` takes off the weights at unit rate, once its averages are filled.

    Of copies in at least single precision, with copies of its state; the rates of groups keep
    their ratios, and the largest is 1.

    Raises:
        ValueError: a group has no rate, or the update is not finite, or is 0.
    """
    groups = [g for g in optimizer.param_groups if g["mode"] == "fo"]
    relative, _ = relative_rates(groups)
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
    for step in range(WARM + 1):
        if step == WARM:
            for group, rate in zip(trial_groups, relative, strict=True):
                group["lr"] = rate
            before = [shadow.detach().clone() for shadow in shadows.values()]
        for shadow, gradient in zip(
            shadows.values(), gradients[step % len(gradients)], strict=True
        ):
            shadow.grad = gradient.to(shadow.dtype, copy=True)
        trial.step()
    update = [b - s.detach() for b, s in zip(before, shadows.values(), strict=True)]
    size = _norm(update)
    if not 0 < size < math.inf:
        raise ValueError(
            f"fo_optimizer must step by a finite update that is not 0, got one of norm {size} at "
            "rate 1"
        )
    return update


def _gradients(closure: Closure, params: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """The mean loss, and its gradients; 0 where the loss does not depend on a parameter."""

    def averaged() -> Any:
        loss = closure()
        return loss.mean() if isinstance(loss, Tensor) and loss.dim() == 1 else loss

    done = evaluate(averaged, gradients=True, first_order=params)
    if not done.backpropagated:
        raise TypeError(
            "closures must return the loss as a tensor with a graph, or call backward themselves: "
            "first-order groups need its gradient"
        )
    found = []
    for p in params:
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        found.append(gradient.detach())
        p.grad = None
    return done.loss.item(), found


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    pairs = zip(a, b, strict=True)
    return sum(float((x.double() * y.double()).sum()) for x, y in pairs)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(_dot([t.detach() for t in tensors], [t.detach() for t in tensors]))
