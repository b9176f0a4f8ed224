"""The learning-rate range test (Smith 2017), for zeroth- and first-order groups apart.

A few steps whose rate grows by a constant factor, from one that changes nothing to one that
diverges. Each kind of groups has a sweep of its own, with the other's weights at rest: together,
the first-order fall would hide the zeroth-order one, which is slower by far, and whichever diverges
first would end the test for both. Both sweeps begin at the same weights.

Zeroth-order losses are noisy, so the loss that is recorded is a clean one: that of the step's batch
before the step, with the same random draws each time, less what it was at the start. What batches
differ by is so taken out.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..evaluation import Closure, GlobalRandomState, averaged, evaluate
from ..freezing import without_graph
from ..optimizer import HybridZOFO
from .first_order import bystanders_of, with_gradients
from .measured import (
    Closures,
    apply_rates,
    check_descent,
    check_quiet,
    check_same,
    closures_of,
    parameters_of,
    put_back,
    relative_rates,
    set_rate,
)
from .outcomes import RangeTest, is_too_high, outcome
from .trial import trial_of


@dataclass(frozen=True)
class LearningRates:
    """See :func:`find_lr`."""

    zo: RangeTest | None
    """Of the zeroth-order groups."""
    fo: RangeTest | None
    """Of the first-order groups."""
    evaluations: int
    """Runs of closures beside those of the steps."""
    steps: int
    """Of both sweeps."""

    @property
    def lr_zo(self) -> float | None:
        """The suggestion; None without such groups, or where no fall was seen."""
        return None if self.zo is None else self.zo.lr

    @property
    def lr_fo(self) -> float | None:
        """Likewise."""
        return None if self.fo is None else self.fo.lr

    def __str__(self) -> str:
        return "\n".join(
            _line(f"lr_{mode}", test)
            for mode, test in (("zo", self.zo), ("fo", self.fo))
            if test is not None
        )

    def apply(self, optimizer: HybridZOFO) -> None:
        """Set the groups' rates, before a scheduler is made; see :meth:`.Suggestion.apply`."""
        apply_rates(optimizer, {"zo": self.lr_zo, "fo": self.lr_fo})

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Losses against rates, a panel for each kind of groups.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .plots import draw

        draw(self, path)


def find_lr(
    optimizer: HybridZOFO,
    closures: Closures,
    *,
    modes: Sequence[str] = ("zo", "fo"),
    steps: int = 100,
    zo: tuple[float, float] = (1e-8, 1.0),
    fo: tuple[float, float] = (1e-6, 10.0),
    early_stop: float = 2.0,
) -> LearningRates:
    """Sweep the learning rate of each kind of groups, from low to high, and put all back.

    The suggestion is the rate at which the loss falls fastest, step by step: of the rates for one
    step it is the best, lr* of :func:`zofo_optim.suggest_hyperparameters`, as long as the fall
    before it has not used up what there is to learn; then it is lower. A sweep is short: rates that
    diverge only later are not seen. ``coupling`` has no part in the first-order sweep: of SGD, take
    1 / (1 + coupling) of its rate. As those, the rates are for the start of a schedule that decays.

    Takes ``steps`` steps and evaluations a sweep, and two evaluations a closure; fewer where
    the loss diverges. Memory: a copy of what trains, in the host's, and one of the state of
    ``fo_optimizer``. Weights, gradients, buffers, generators and all of the optimizer are then as
    before, to the bit, also where it raises. Listeners, such as a journal, hear nothing.

    Args:
        optimizer: as it will train, of any model; weights are those of the live model.
        closures: one, or several, as ``step`` takes them, each of a batch of its own that it keeps.
            They take turns. With few, the loss falls by what is learnt by heart: give 10 or more.
        modes: which kinds of groups are swept.
        steps: of each sweep, at least 10.
        zo: lowest and highest rate of the zeroth-order groups.
        fo: of the first-order groups. Where groups of a kind have rates, their ratios are kept, and
            this is that of the largest.
        early_stop: a sweep ends where the loss is above so many times its start, > 1.

    Returns:
        :class:`LearningRates`.

    Raises:
        TypeError, ValueError: an argument's type, or out of its range; a loss that is not finite at
            the start; sharded weights; ``maximize``; a loss that a GradScaler scaled.
        RuntimeError: called in a closure, between backward and step, or in one of several
            processes; or a closure's loss is another each time.

    Example:
        >>> from itertools import islice
        >>> groups = hybrid_param_groups(model, zo=dict(lr=1e-6), fo=dict(lr=1e-3))
        >>> optimizer = HybridZOFO(groups)
        >>> batches = list(islice(loader, 16))
        >>> found = find_lr(
        ...     optimizer, [lambda batch=batch: model(**batch).loss for batch in batches])
        >>> print(found)
        >>> found.plot("rates.png")
    """
    check_quiet(optimizer, "find_lr")
    some = closures_of(closures)
    check_descent(optimizer, "find_lr")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 10:
        raise ValueError(f"steps must be an int >= 10, got {steps!r}")
    if not 1 < early_stop < math.inf:
        raise ValueError(f"early_stop must be a finite number > 1, got {early_stop!r}")
    known = {"zo": _checked("zo", zo), "fo": _checked("fo", fo)}
    if isinstance(modes, str) or not modes or {*modes} - {*known}:
        raise ValueError(f"modes must be some of 'zo' and 'fo', got {modes!r}")
    ranges = {mode: known[mode] for mode in known if mode in modes}
    found: dict[str, RangeTest] = {}
    count = taken = 0
    trained = parameters_of(optimizer, "fo") if "fo" in modes else []
    bystanders = bystanders_of(optimizer)
    with ExitStack() as stack:
        again = stack.enter_context(put_back(optimizer, parameters_of(optimizer)))
        stack.callback(bystanders.put_back)
        devices = {p.device for p in parameters_of(optimizer)}
        draws = GlobalRandomState(devices)

        def clean(closure: Closure) -> float:
            nonlocal count
            count += 1
            return replayed(lambda: _loss(closure))

        def replayed(run: Callable[[], float]) -> float:
            after = GlobalRandomState(devices)
            draws.restore()
            try:
                with optimizer.buffers.as_before():
                    return run()
            finally:
                after.restore()

        def with_backward(closure: Closure) -> float:
            nonlocal count
            count += 1
            done = with_gradients(optimizer, closure, trained, bystanders)
            return done.loss.item()

        starts = [clean(closure) for closure in some]
        if not all(map(math.isfinite, starts)):
            raise ValueError(f"closures must return finite losses at the start, got {starts}")
        for closure, start in zip(some, starts, strict=True):
            one = partial(with_backward, closure)
            check_same(start, replayed(one) if trained else clean(closure))
        for mode, (low, high) in ranges.items():
            if not parameters_of(optimizer, mode):
                continue
            resting = parameters_of(optimizer, "zo") if mode == "fo" else []
            with optimizer.buffers.as_before(), without_graph(resting):
                again()
                rates = np.geomspace(low, high, steps).tolist()
                trial = trial_of(optimizer, mode)
                losses, steps_of_it = _sweep(trial, some, rates, starts, clean, early_stop)
            taken += steps_of_it
            found[mode] = outcome(rates, losses, early_stop, steps)
            again()
    return LearningRates(found.get("zo"), found.get("fo"), count, taken)


def _sweep(
    trial: HybridZOFO,
    closures: Sequence[Closure],
    rates: Sequence[float],
    starts: Sequence[float],
    clean: Any,
    early_stop: float,
) -> tuple[list[float], int]:
    """Losses before each step, until one is too high; and how many steps were taken."""
    relative, _ = relative_rates(trial.param_groups)
    start = sum(starts) / len(starts)
    losses: list[float] = []
    steps = 0
    for number, rate in enumerate(rates):
        which = number % len(closures)
        losses.append(start + clean(closures[which]) - starts[which])
        if is_too_high(losses[-1], start, early_stop):
            break
        for group, ratio in zip(trial.param_groups, relative, strict=True):
            set_rate(group, rate * ratio)
        trial.zero_grad()
        steps += 1
        try:
            with warnings.catch_warnings():  # of these groups alone, at rates far too high
                warnings.simplefilter("ignore", UserWarning)
                trial.step(closures[which])
        except FloatingPointError:  # nonfinite="raise": it has diverged
            losses[-1] = math.inf
            break
    return losses, steps


def _loss(closure: Closure) -> float:
    """The mean loss, without gradients."""
    return evaluate(averaged(closure), gradients=False).loss.item()


def _checked(name: str, given: Any) -> tuple[float, float]:
    try:
        low, high = map(float, given)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 < low < high < math.inf:
        raise ValueError(f"{name} must be two rates, 0 < low < high, got {given!r}")
    return low, high


def _line(name: str, test: RangeTest) -> str:
    if test.lowest is None:
        return f"{name}: the loss did not fall visibly, from {test.losses[0]:.4g}"
    text = (
        f"{name} = {test.lr:.2g}: there the loss falls fastest; it is lowest at "
        f"{test.lowest:.2g}, {min(test.smoothed):.4g} from {test.losses[0]:.4g}"
    )
    return text + (f"; it diverged at {test.diverged:.2g}" if test.diverged else "")
