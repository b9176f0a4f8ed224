"""The first-order rate: where the loss, along the optimizer's own update, stops falling.

The update u of ``fo_optimizer`` at unit rate is that of a copy which has seen the batches'
gradients, over and over, at the weights as they are: so Adam's averages and momentum are filled.
The slope of these batches' loss along -u is phi'(lr) = -grad f(y - lr u) . u, and

    lr* : phi'(lr*) = 0,

the rate of the largest decrease along it; for a quadratic loss it is grad f . u / (u' H u). It is
sought from a small rate on, by doubling, so that curvature is seen at the length of the step: a
network's differs much from that at a point. Optimizers other than SGD, Adam and AdamW may step by
much more at first, or later: their updates after 1 and after 300 steps are looked at besides, and
one that is larger by far is taken. As for zeroth order, these are the batches of the step
itself: others would say how much of the update is noise, not how long it may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation import Closure, Evaluation, averaged, evaluate
from ..freezing import without_graph
from ..groups_and_state import GroupsAndState
from ..smoothness.bystanders import Bystanders
from ..smoothness.vectors import dot, norm
from .measured import check_same, parameters_of, put_back
from .updates import WARM, trial_update

BATCHES = 4
"""So many are looked at, at most: the first ones."""
_SMALL = 1e-3
"""Length of the first displacement, over the weights' norm."""
_DOUBLINGS = 20


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
    """With a backward each, and one a batch without."""
    step: int = WARM
    """The trial step whose update it is."""
    larger: float = 1.0
    """How much larger that is than after :data:`WARM` steps."""


def measure(optimizer: GroupsAndState, closures: Sequence[Closure]) -> FirstOrder:
    """Of all first-order groups together; see the module. Weights move, and are put back."""
    params = parameters_of(optimizer, "fo")
    count = 0
    with put_back(optimizer, params) as again:

        def gradients(closure: Closure) -> tuple[float, list[Tensor]]:
            nonlocal count
            count += 1
            return _gradients(optimizer, closure, params)

        some = closures[:BATCHES]
        found, losses = [], []
        for closure in some:
            again()
            loss, gradient = gradients(closure)
            found.append(gradient)
            losses.append(loss)
            again()
            count += 1
            check_same(loss, evaluate(averaged(closure), gradients=False).loss.item())
        update, step, larger = trial_update(optimizer, params, found)
        start = [-dot(gradient, update) for gradient in found]
        del found

        falls = sum(start) / len(start)
        values = [p.detach() for p in params]
        small = _SMALL * norm(values) / norm(update) if norm(values) else _SMALL

        def slope_at(rate: float) -> float:
            slopes = []
            for closure in some:
                again()
                with torch.no_grad():
                    for p, u in zip(params, update, strict=True):
                        p.copy_(p - rate * u)
                slopes.append(-dot(gradients(closure)[1], update))
            return sum(slopes) / len(slopes)

        near = slope_at(small)
        lr = turning(slope_at, falls, small, near)
    spread = torch.tensor(start, dtype=torch.float64)
    error = (spread.std() / len(start) ** 0.5).item() if len(start) > 1 else math.nan
    curvature = (near - falls) / small
    mean = sum(losses) / len(losses)
    return FirstOrder(lr, -falls, error, curvature, mean, len(some), count, step, larger)


def gradient_norms(
    optimizer: GroupsAndState, closures: Sequence[Closure]
) -> tuple[list[float], float]:
    """Norms of the first-order gradients: of each batch's, and of their mean."""
    params = parameters_of(optimizer, "fo")
    norms, mean = [], [torch.zeros_like(p) for p in params]
    with put_back(optimizer) as again:
        for closure in closures:
            again()
            _, gradient = _gradients(optimizer, closure, params)
            norms.append(norm(gradient))
            for total, g in zip(mean, gradient, strict=True):
                total += g / len(closures)
    return norms, norm(mean)


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


class _Unscaled(Bystanders):
    """Refuses what a GradScaler has scaled."""

    def look(self, root: Tensor, scaled: bool = False) -> None:
        if scaled:
            raise ValueError(
                "closures must return the loss itself, and leave backward to the optimizer, got "
                "one that a GradScaler scaled: rates would be wrong by its scale"
            )
        super().look(root, scaled)


def bystanders_of(optimizer: GroupsAndState) -> Bystanders:
    """Puts ``.grad`` of leaves outside the optimizer back; refuses losses that are scaled."""
    return _Unscaled(parameters_of(optimizer))


def with_gradients(
    optimizer: GroupsAndState,
    closure: Closure,
    params: Sequence[Tensor],
    bystanders: Bystanders,
) -> Evaluation:
    """One evaluation that leaves the gradients of ``params``, and none of zeroth-order ones.

    Raises:
        ValueError: a GradScaler scaled the loss.
    """
    resting = parameters_of(optimizer, "zo")
    with without_graph(resting, check=True), bystanders.in_backward():
        done = evaluate(averaged(closure), gradients=True, first_order=params, look=bystanders)
    if done.scaled:
        bystanders.look(done.loss, scaled=True)
    return done


def _gradients(
    optimizer: GroupsAndState, closure: Closure, params: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """The mean loss, and its gradients; 0 where the loss does not depend on a parameter."""
    bystanders = bystanders_of(optimizer)
    try:
        done = with_gradients(optimizer, closure, params, bystanders)
    finally:
        bystanders.put_back()
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
