"""From what was measured to rates to start with, and why, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .first_order import FirstOrder
from .perturbation_size import FINE, PerturbationSize
from .updates import WARM
from .zeroth_order import ZerothOrder

OF_ZEROTH_ORDER = 0.15
"""The rate to start with, over lr*: calibrated, see docs/learning-rates.md."""
OF_FIRST_ORDER = 0.5
"""Likewise."""
_NOISY = 0.5
"""A standard error, over what it is of, that is worth a warning."""


@dataclass(frozen=True)
class Rates:
    """What to start with; None: the optimizer has no such group, or no number could be found."""

    lr_zo: float | None
    lr_fo: float | None
    mu: float | None
    reasons: tuple[str, ...]
    """A sentence or two for each."""
    warnings: tuple[str, ...]
    """What makes a number doubtful."""

    def __str__(self) -> str:
        lines = [
            f"{name} = {value:.2g}"
            for name, value in (("lr_zo", self.lr_zo), ("lr_fo", self.lr_fo), ("mu", self.mu))
            if value is not None
        ]
        lines += [f"- {reason}" for reason in self.reasons]
        if not self.lr_zo is self.lr_fo is None:
            lines.append("- Rates are for the start of a schedule that decays, linear or cosine.")
        return "\n".join([*lines, *(f"! {warning}" for warning in self.warnings)])


def rates_of(
    zeroth_order: ZerothOrder | None,
    size: PerturbationSize | None,
    first_order: FirstOrder | None,
) -> Rates:
    """Of what was measured; pure."""
    reasons: list[str] = []
    warnings: list[str] = []
    lr_zo = lr_fo = mu = None
    if zeroth_order is not None:
        lr_zo = _zeroth_order(zeroth_order, reasons, warnings)
    if first_order is not None:
        lr_fo = _first_order(first_order, reasons, warnings)
    if size is not None:
        mu = _mu(size, reasons, warnings)
    return Rates(lr_zo, lr_fo, mu, tuple(reasons), tuple(warnings))


def _zeroth_order(found: ZerothOrder, reasons: list[str], warnings: list[str]) -> float | None:
    terms = found.terms
    if found.is_noise:
        warnings.append(
            "lr_zo: no rate could be found; curvatures along random directions are mostly noise of "
            f"the computed loss, {100 * min(found.noise, 1.0):.0f} % of their mean square by "
            f"displacements of {found.displacement:.1g}: evaluate the loss in higher precision, "
            "or take find_lr"
        )
        return None
    if math.isnan(terms.lr):
        warnings.append(
            f"lr_zo: no rate could be found; along {found.directions} directions the loss falls by "
            f"{terms.gain:.2g} and turns by {terms.magnitude:.2g} a unit of rate, and both must be "
            "above 0: do the zeroth-order parameters reach the loss?"
        )
        return None
    of, size = ("E[u'Hu]", terms.bend) if terms.turns else ("E[|u'Hu|]", terms.magnitude)
    reasons.append(
        f"lr_zo: a step lowers its batch's loss most at lr* = {terms.gain:.3g} / {size:.3g} "
        f"= {terms.lr:.2g} (± {found.error:.1g}), E[g.u] / {of} along {found.directions} "
        f"directions, and raises it beyond twice that; the trace of H is {found.trace:.3g} "
        f"(± {found.trace_error:.1g}). Suggested is {OF_ZEROTH_ORDER:g} lr*."
    )
    if not terms.turns:
        warnings.append(
            f"lr_zo: the loss does not turn upwards along {found.directions} directions (E[u'Hu] = "
            f"{terms.bend:.2g}), so the magnitude of its curvature was taken; curvature will rise "
            "in training: ask again after some steps"
        )
    if not found.error < _NOISY * terms.lr:
        warnings.append(
            f"lr_zo: lr* has a standard error of {found.error:.1g}; take more directions"
        )
    if found.lr < terms.lr:
        warnings.append(
            f"lr_zo: lr* may be anything, so {found.lr:.2g} was taken in its place, by the trace "
            f"of H and twice its error ({found.trace + 2 * found.trace_error:.3g}): take more "
            "directions or batches"
        )
    if terms.others < 0.1 * terms.gain:
        warnings.append(
            f"lr_zo: a step that lowers its batch's loss by {terms.gain:.2g} a unit of rate lowers "
            f"that of other batches by {terms.others:.2g}: noise prevails; let the rate decay, or "
            "take larger batches"
        )
    return OF_ZEROTH_ORDER * found.lr


def _first_order(found: FirstOrder, reasons: list[str], warnings: list[str]) -> float | None:
    if math.isnan(found.lr):
        warnings.append(
            "lr_fo: no rate could be found; along the first-order update the loss falls by "
            f"{found.slope:.2g} a unit of rate, which must be above 0, and must stop to: give more "
            "batches, or take find_lr"
        )
        return None
    reasons.append(
        f"lr_fo: along the optimizer's own update the loss falls by {found.slope:.3g} a unit of "
        f"rate at first, and no more at lr* = {found.lr:.2g} ({found.batches} batches). Suggested "
        f"is {OF_FIRST_ORDER:g} lr*."
    )
    if not math.isnan(found.slope_error) and not found.slope_error < _NOISY * found.slope:
        warnings.append(
            f"lr_fo: that slope has a standard error of {found.slope_error:.1g}; give more batches"
        )
    if found.larger > 1:
        warnings.append(
            f"lr_fo: fo_optimizer's update at step {found.step} is {found.larger:.2g} times that "
            f"after {WARM}, and the larger one was taken; it may be larger still at another step"
        )
    return OF_FIRST_ORDER * found.lr


def _mu(found: PerturbationSize, reasons: list[str], warnings: list[str]) -> float:
    best = f"{found.best:.1g}" if found.best < math.inf else "any larger one"
    reason = (
        f"mu: the error of a slope at {found.mu:g} is {100 * found.error:.2g} % of its size, the "
        f"least one is {100 * found.best_error:.2g} %, at {best} (losses have a noise of "
        f"{found.noise:.1g})."
    )
    keep = found.error <= FINE
    reasons.append(f"{reason} {'Kept.' if keep else 'Suggested is the latter.'}")
    if found.best_error > FINE:
        warnings.append("mu: no size makes slopes exact; evaluate the loss in higher precision")
    return found.mu if keep else found.best
