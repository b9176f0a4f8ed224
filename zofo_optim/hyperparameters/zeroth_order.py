"""The zeroth-order rate, from slopes and curvatures along the optimizer's own directions.

For a step x <- x - lr u on a batch, with the estimate u = (1/q) sum_s r_s v_s of its gradient g
(r_s: the slope along v_s, after ``zo_rule``), the expected decrease of the batch's loss is, to
second order,

    lr E[g . u] - lr^2 E[u' H u] / 2,    largest at    lr* = E[g . u] / E[u' H u],

and at twice lr* there is none: for a plain step along one Gaussian direction E[u' H u] is
||g||^2 tr H + 2 g' H g, so lr* is 1 / tr H or a little less, where first order could take 1 / L.
Both terms are means over directions, and need no more than forward passes:

    E[g . u]    = E[r s],          s = g . v the slope,
    E[u' H u]   = E[r^2 c] / q + (1 - 1/q) E[r_s r_t v_s' H v_t],    c = v' H v the curvature.

The second part, of two directions, is g' H g with plain slopes. For Gaussian v it is
Cov(r^2, c) / 2, which overstates it for directions of low rank; where its estimate is negative it
is taken as 0. Signs' covariance leaves the diagonal of H out, so that this part alone is then
measured along Gaussian directions. With one direction for each of B examples, q is B.

Slopes and curvatures are those of a displacement at which curvature is more than rounding, mu or a
longer one: see :func:`zofo_optim.smoothness.forward.curvature_mu`.

H is that of all batches together. How much the full loss f falls is another matter: E[grad f . u]
is E[r s'], with the slope s' of another batch along the same direction. Where batches disagree it
is far below E[r s]; the rate then has to fall during training, and may still begin as large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..evaluation import Closure
from ..groups_and_state import GroupsAndState
from ..rules import Rule
from ..smoothness import Along, along_directions
from ..smoothness.forward import Displacement, displacement

MOSTLY = 0.5
"""The share of noise from which on there is no rate."""


class Terms(NamedTuple):
    """What decides a rate: expectations at a step of unit rate."""

    gain: float
    """E[g . u]: how fast the loss of the step's own batch falls."""
    others: float
    """E[grad f . u]: how fast that of other batches does; NaN with one batch."""
    bend: float
    """E[u' H u]: how fast it turns."""
    magnitude: float
    """Of ``bend``, with |c| and the second part's magnitude: were all curvatures positive."""
    spread: float
    """E[r^2] / q, by which tr H is multiplied where slopes and curvatures are independent."""

    @property
    def turns(self) -> bool:
        """Whether the loss turns upwards in expectation."""
        return self.bend > 0

    @property
    def lr(self) -> float:
        """The rate of the largest expected decrease.

        Where the loss does not turn, with ``magnitude`` in place of ``bend``: among curvatures of
        both signs the positive ones soon prevail. NaN where the loss does not fall, or is flat.
        """
        size = self.bend if self.turns else self.magnitude
        return self.gain / size if self.gain > 0 and size > 0 else math.nan


@dataclass(frozen=True)
class ZerothOrder:
    """What was measured along random directions."""

    terms: Terms
    error: float
    """Standard error of ``terms.lr``, by the jackknife over directions; NaN with one direction."""
    trace: float
    """tr H: the mean curvature along a direction."""
    trace_error: float
    norms: tuple[float, ...]
    """Of each batch's gradient, by the slopes: sqrt(E s^2)."""
    mean_norm_squared: float
    """Of the mean gradient, from slopes of pairs of batches; may come out below 0."""
    loss: float
    directions: int
    batches: int
    displacement: float
    """What curvatures were measured by: ``mu``, or more."""
    noise: float
    """The share of rounding in the mean square of curvatures."""
    evaluations: int
    """Of closures, without those that verify."""

    @property
    def is_told(self) -> bool:
        """Whether lr* is known to within its own size; a jackknife may give NaN."""
        return self.error < self.terms.lr

    @property
    def lr(self) -> float:
        """``terms.lr``; where it is not told, at most what the trace's upper bound admits."""
        safe = self.terms.spread * (self.trace + 2 * self.trace_error)
        if self.is_told or not safe > 0:
            return self.terms.lr
        return min(self.terms.lr, self.terms.gain / safe)

    @property
    def is_noise(self) -> bool:
        """Whether curvatures are mostly rounding, so that nothing follows from them."""
        return self.noise > MOSTLY


def measure(
    optimizer: GroupsAndState, closures: Sequence[Closure], directions: int, seed: int
) -> tuple[ZerothOrder, Along, Displacement]:
    """Along the same directions on each batch; see the module. And what the first batch gave."""
    settings = optimizer.settings
    size = displacement(optimizer, closures[0], seed)

    def along(closure: Closure, distribution: str | None = None) -> Along:
        return along_directions(
            optimizer,
            closure,
            directions=directions,
            seed=seed,
            mu=size.mu,
            distribution=distribution,
        )

    found = [along(closure) for closure in closures]
    if len({one.slopes.shape for one in found}) > 1:
        raise ValueError(
            "closures must return the losses of equally many examples, got "
            f"{[one.slopes.shape[1] for one in found]}: leave the smaller batch out"
        )
    slopes = torch.stack([along.slopes for along in found])  # (batches, directions[, B])
    curvatures = torch.stack([along.curvatures.reshape(directions, -1).mean(1) for along in found])
    losses = torch.stack([along.loss.mean() for along in found])
    for what in (slopes, curvatures):
        if not what.isfinite().all():
            raise FloatingPointError(
                "closures must return finite losses around the weights, got one that is not"
            )
    together = settings.examples_of_a_direction if slopes.dim() == 3 else 1
    steps = [estimates(slopes_of, together, settings.num_samples) for slopes_of in slopes]
    shaped = torch.stack([after_rule(settings.rule, rows, directions) for rows in steps])
    batch = slopes.reshape(*slopes.shape[:2], -1).mean(2)  # (batches, directions)
    bends = curvatures.mean(0)
    samples = steps[0].shape[1]
    count = len(closures) * (1 + 2 * directions)
    square = bends.square().mean().item()
    noise = size.curvature_noise**2 / len(closures)
    pairs = None
    if samples > 1 and settings.distribution == "rademacher":
        more = [along(closure, "gaussian") for closure in closures]
        count *= 2
        others = torch.stack([one.slopes.reshape(directions, -1).mean(1) for one in more])
        forms = torch.stack([one.curvatures.reshape(directions, -1).mean(1) for one in more])
        scale = shaped.mean(2).square().mean() / batch.square().mean().clamp(min=1e-300)
        pairs = scale * others.square().mean(0), forms.mean(0)

    def terms(kept: Tensor) -> Terms:
        these = None if pairs is None else (pairs[0][kept], pairs[1][kept])
        return terms_of(shaped[:, kept], batch[:, kept], bends[kept], samples, these)

    everything = torch.ones(directions, dtype=torch.bool)
    places = torch.arange(directions)
    without = [terms(places != k).lr for k in range(directions)] if directions > 1 else [math.nan]
    measured = ZerothOrder(
        terms(everything),
        _jackknife(without),
        bends.mean().item(),
        (bends.std() / directions**0.5).item(),
        tuple(batch.square().mean(1).sqrt().tolist()),
        _crossed(batch),
        losses.mean().item(),
        directions,
        len(closures),
        size.mu,
        noise / square if square else math.inf,
        count + size.evaluations,
    )
    return measured, found[0], size


def estimates(slopes: Tensor, together: int, samples: int) -> Tensor:
    """Slopes of one batch as the estimates of successive steps have them, shape (steps, q).

    Args:
        slopes: shape (directions,), or (directions, B) of examples.
        together: examples that share a direction.
        samples: directions of a step, where all examples share them.

    Raises:
        ValueError: the batch's examples do not fit ``together``, or ``samples`` the directions.
    """
    if slopes.dim() == 2:
        if slopes.shape[1] % together:
            raise ValueError(
                f"closures must return the losses of a multiple of {together} examples, which "
                f"share a direction, got {slopes.shape[1]}"
            )
        return slopes.view(len(slopes), -1, together).mean(2)
    if len(slopes) % samples:
        raise ValueError(
            f"directions must be a multiple of num_samples={samples}, got {len(slopes)}"
        )
    return slopes.view(-1, samples)


def after_rule(rule: Rule, slopes: Tensor, directions: int) -> Tensor:
    """Slopes as ``zo_rule`` makes them, step after step, shape (directions, any).

    Args:
        rule: of the optimizer.
        slopes: shape (steps, q).
        directions: that they are along.
    """
    state = {name: torch.tensor(v, dtype=torch.float64) for name, v in rule.init().items()}
    shaped = []
    for row in slopes:
        coefficients, after = rule.update(row / row.numel(), state)
        state = dict(after)
        shaped.append(coefficients * row.numel())
    return torch.stack(shaped).view(directions, -1)


def terms_of(
    shaped: Tensor,
    slopes: Tensor,
    curvatures: Tensor,
    samples: int,
    pairs: tuple[Tensor, Tensor] | None = None,
) -> Terms:
    """The two expectations, from what each direction gave.

    Args:
        shaped: slopes after the rule, shape (batches, directions, any).
        slopes: of whole batches, shape (batches, directions).
        curvatures: of all batches together, shape (directions,).
        samples: directions of one step.
        pairs: r^2 and c along Gaussian directions, for the part of two; None: these are.
    """
    batches = len(slopes)
    means = shaped.mean(2)  # (batches, directions)
    own = (means * slopes).sum(0)
    others = math.nan
    if batches > 1:
        crossed = means.sum(0) * slopes.sum(0) - own
        others = crossed.mean().item() / (batches * (batches - 1))
    squares = shaped.square().mean((0, 2))
    bend = (squares * curvatures).mean() / samples
    magnitude = (squares * curvatures.abs()).mean().item() / samples
    if samples > 1:
        products, forms = (means.square().mean(0), curvatures) if pairs is None else pairs
        pair = ((products * forms).mean() - products.mean() * forms.mean()) / 2
        bend = bend + (1 - 1 / samples) * pair.clamp(min=0.0)
        magnitude += (1 - 1 / samples) * pair.abs().item()
    spread = squares.mean().item() / samples
    return Terms(own.mean().item() / batches, others, bend.item(), magnitude, spread)


def _crossed(slopes: Tensor) -> float:
    """E s s' over pairs of batches; with one batch, E s^2."""
    batches = len(slopes)
    if batches == 1:
        return slopes.square().mean().item()
    pairs = slopes.sum(0).square() - slopes.square().sum(0)
    return pairs.mean().item() / (batches * (batches - 1))


def _jackknife(values: Sequence[float]) -> float:
    found = torch.tensor(values, dtype=torch.float64)
    count = len(found)
    return ((found - found.mean()).square().sum() * (count - 1) / count).sqrt().item()
