"""A step of the optimizer against the reference: where it evaluates, its slope, its update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zofo_kernels import Shift, perturb_, update_
from zofo_optim import HybridZOFO

from .check import require_close, windows
from .registry import WrongResult

SLOPE_TOLERANCE = 1e-4
"""Of a projected gradient, absolute and relative, given the very losses that it is made of."""

Closure = Callable[[], Tensor]


class _Watch:
    """A closure that keeps what it was called with: weights, random state; and its losses."""

    def __init__(self, closure: Closure, look: Callable[[], Tensor]) -> None:
        self._closure = closure
        self._look = look
        self.weights: list[Tensor] = []
        self.random_states: list[list[Tensor]] = []
        self.losses: list[float] = []

    def __call__(self) -> Tensor:
        self.weights.append(self._look())
        self.random_states.append(_random_state())
        loss = self._closure()
        self.losses.append(float(loss.detach()))
        return loss


def _random_state() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def check_step(
    what: str,
    optimizer: HybridZOFO,
    closure: Closure,
    *,
    signs: Sequence[int],
    distribution: str,
    first: bool = True,
    width: int = 256,
) -> None:
    """Do one step and compare it with the reference on windows of every zeroth-order tensor.

    An optimizer's first step evaluates once more at its first displaced point, to verify that
    the loss repeats. Steps that are timed are later ones, so check one of these as well.

    Args:
        what: for messages.
        optimizer: with at most one zeroth-order group and one sample.
        closure: its loss.
        signs: multiples of mu z at which the loss must be taken, in order; 0 is the clean one.
        distribution: of the optimizer.
        first: whether the optimizer has done no step yet.
        width: elements of a window.

    Raises:
        WrongResult: an evaluation is missing or too many, or at other weights, or with other
            random draws than the first; or the loss does not repeat; or the projected gradient
            or the update is wrong.
    """
    group = next(iter(optimizer.zo_groups()), None)
    tensors = [p.detach() for p in group.params] if group is not None else []
    pieces = [(i, a, b) for i, t in enumerate(tensors) for a, b in windows(t.numel(), width, 2)]
    indices, offsets = [i for i, _, _ in pieces], [a for _, a, _ in pieces]

    def look() -> Tensor:
        parts = [tensors[i].view(-1)[a:b] for i, a, b in pieces]
        return torch.cat(parts) if parts else torch.empty(0)

    before = look()
    direction = group.direction(0) if group is not None else None
    watch = _Watch(closure, look)
    optimizer.step(watch)
    visits = _visits(signs) if first else [(sign, False) for sign in signs]
    if len(watch.losses) != len(visits):
        raise WrongResult(f"{what}: {len(watch.losses)} evaluations, should be {len(visits)}")
    for state in watch.random_states:
        if not all(map(torch.equal, state, watch.random_states[0])):
            raise WrongResult(f"{what}: evaluations do not share their random draws")
    if group is None or direction is None:
        return

    mu, lr = group.mu, group.options["lr"]
    factor = 0.0 if distribution == "rademacher" else mu
    expected = [piece.clone() for piece in torch.split(before, [b - a for _, a, b in pieces])]
    carried: Shift | None = None
    losses: list[float] = []  # that the step uses
    for (sign, repeated), found, loss in zip(visits, watch.weights, watch.losses, strict=True):
        if sign and not repeated:
            shift = Shift(direction, sign * mu)
            perturb_(
                expected,
                shift.direction,
                shift.scale,
                recover=carried,
                indices=indices,
                offsets=offsets,
                backend="reference",
            )
            carried = shift
        require_close(
            f"{what}, weights of the evaluation at {sign:+d} mu z",
            before,
            found,
            torch.cat(expected),
            noise=2 * factor,
            ulps=2 if factor else 0,
            reach=6 * mu,
        )
        if not repeated:
            losses.append(loss)
        elif loss != losses[-1]:
            raise WrongResult(f"{what}: the loss {losses[-1]:.9g} is {loss:.9g} when repeated")
    slope = _check_slope(what, optimizer, signs, losses, mu)
    update_(
        expected,
        [direction],
        slope.reshape(1),
        lr,
        recover=carried,
        indices=indices,
        offsets=offsets,
        backend="reference",
    )
    require_close(
        f"{what}, updated weights",
        before,
        look(),
        torch.cat(expected),
        noise=2 * factor + lr * abs(float(slope)),
        ulps=4 if factor else 1,
        reach=6 * mu,
    )


def _visits(signs: Sequence[int]) -> list[tuple[int, bool]]:
    """Of a first step: each sign, and whether it repeats the one before, for verification."""
    found: list[tuple[int, bool]] = []
    for sign in signs:
        verified = any(before for before, _ in found)
        found.append((sign, False))
        if sign and not verified:
            found.append((sign, True))
    return found


def _check_slope(
    what: str, optimizer: HybridZOFO, signs: Sequence[int], losses: Sequence[float], mu: float
) -> Tensor:
    """The projected gradient, which must be the difference of the last two losses."""
    found: Tensor | None = optimizer.projected_grads
    assert found is not None
    slope = (losses[-1] - losses[-2]) / ((signs[-1] - signs[-2]) * mu)
    if not abs(float(found) - slope) <= SLOPE_TOLERANCE * (1 + abs(slope)):
        raise WrongResult(f"{what}: projected gradient {float(found):.5g}, should be {slope:.5g}")
    return found
