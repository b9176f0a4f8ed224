"""Lemma B.5, measured with the library's optimizer: bias and variance of one estimate.

    E<u, e - g> <= (mu/2) L (d + 3)^(3/2) |u|,    E|e - g|^2 <= 32 d |g|^2 + 108 mu^2 L^2 d^4,

for an estimate e of the gradient g, in d weights. The functions have gradients that are exactly
L-Lipschitz, and the curvature that each estimator sees worst.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zofo_optim import HybridZOFO

L = 1.0
SMALL_STEP = 1e-4
"""Curvature is not seen."""


@dataclass(frozen=True)
class Kind:
    """Of directions, for a matrix of `rows` x `columns` weights."""

    rows: int = 4
    columns: int = 3
    distribution: str = "gaussian"
    rank: int = 0
    """0: full noise."""

    @property
    def d(self) -> int:
        return self.rows * self.columns

    @property
    def name(self) -> str:
        kind = "Gaussian" if self.distribution == "gaussian" else "±1"
        return f"{kind}, {f'rank {self.rank}' if self.rank else 'full'}"

    def options(self) -> dict[str, Any]:
        more = {"structure": "low_rank", "rank": self.rank} if self.rank else {}
        return {"distribution": self.distribution, **more}

    def fourth_moment(self) -> float:
        """E <g, v>^2 |v|^2 / |g|^2: d + 2 and d for full noise; derived in docs/theory.md."""
        m, k, r, gaussian = self.rows, self.columns, self.rank, self.distribution == "gaussian"
        if min(m, k) == 1 or not r:  # a vector has full noise
            return self.d + 2.0 * gaussian
        if gaussian:
            return self.d + 2 + 2 * (m + k + 1) / r
        return self.d + 2 * (r - 1) / r


KINDS = [
    Kind(distribution=distribution, rank=rank)
    for distribution in ("gaussian", "rademacher")
    for rank in (0, 1, 2)
]
SMALL = [
    Kind(rows, columns, distribution, rank)
    for rows, columns, rank in ((1, 1, 0), (1, 2, 0), (2, 2, 0), (2, 2, 1))
    for distribution in ("gaussian", "rademacher")
]
"""Where d is small: the chain of inequalities that the paper prints holds from d = 5 on."""


def odd(weight: Tensor) -> Tensor:
    """(L/2) sum w |w|: central differences see its curvature, too. Shape (examples,) or ()."""
    return L / 2 * (weight * weight.abs()).sum()


def even(weight: Tensor) -> Tensor:
    """(L/2) |w|^2."""
    return L / 2 * weight.square().sum()


@dataclass(frozen=True)
class Case:
    """A function with a gradient of norm `slope` at 0, and the step size that it is seen with."""

    slope: float
    mu: float
    curved: Callable[[Tensor], Tensor]


CASES = {
    "gradient": Case(1.0, SMALL_STEP, odd),  # the first term of each bound
    "curvature": Case(0.0, 1.0, odd),  # the second
    "curvature, even": Case(0.0, 1.0, even),
    "both": Case(1.0, 0.3, odd),
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "one-sided": dict(estimator="one_sided"),
    "two-sided": dict(estimator="two_sided"),
    "two-sided, mean of 4": dict(estimator="two_sided", num_samples=4),
}


@dataclass
class Found:
    """Moments of estimates, and the lemma's bounds on them."""

    kind: Kind
    case: Case
    estimates: Tensor = field(repr=False)
    """Shape (estimates, d)."""
    gradient: Tensor = field(repr=False)
    samples: int = 1

    def summary(self) -> dict[str, float]:
        """Ratios to the bounds, and to the exact variance, with standard errors.

        The exact variance, (E <g, v>^2 |v|^2 - |g|^2) / q, is given where nothing is curved; the
        bias, less what a mean of so few estimates has by chance, where this is small beside it.
        """
        d, mu, count, slope = self.kind.d, self.case.mu, len(self.estimates), self.case.slope
        errors = self.estimates - self.gradient
        squares = errors.square().sum(1)
        variance, spread = float(squares.mean()), float(squares.std()) / math.sqrt(count)
        bound = 32 * d * slope**2 + 108 * (mu * L) ** 2 * d**4
        found = {"variance / bound": variance / bound, "error": spread / bound}
        if slope == 0:
            noise = float(errors.var(0).sum()) / count
            bias = math.sqrt(max(float(errors.mean(0).square().sum()) - noise, 0.0))
            limit = mu / 2 * L * (d + 3) ** 1.5
            found.update({"bias / bound": bias / limit, "bias error": math.sqrt(noise) / limit})
        exact = (self.kind.fourth_moment() - 1) * slope**2 / self.samples
        if exact > 0 and mu <= SMALL_STEP:
            found.update({"variance / exact": variance / exact, "exact error": spread / exact})
        return found


def measured(
    kind: Kind, case: Case, options: Mapping[str, Any], count: int, seed: int = 0
) -> Found:
    """What a step at rate 1 takes off the weights, which start at 0 each time."""
    gradient = torch.zeros(kind.rows, kind.columns, dtype=torch.float64)
    gradient[0, 0] = case.slope  # where the fourth moment of a single element counts
    weight = torch.zeros_like(gradient)
    optimizer = HybridZOFO(
        [{"params": [weight], "mode": "zo", "lr": 1.0, "mu": case.mu}],
        **{"seed": seed, **kind.options(), **options},
    )

    def loss() -> Tensor:
        return (gradient * weight).sum() + case.curved(weight)

    found = torch.empty(count, kind.d, dtype=torch.float64)
    for place in range(count):
        weight.zero_()
        optimizer.zero_grad()
        optimizer.step(loss)
        found[place] = -weight.flatten()
    return Found(kind, case, found, gradient.flatten(), options.get("num_samples", 1))


PER_EXAMPLE: dict[str, dict[str, Any]] = {
    "one-sided, per example": dict(estimator="one_sided"),
    "two-sided, per example": dict(estimator="two_sided"),
    "antithetic, alike": dict(estimator="antithetic"),
    "antithetic, unlike": dict(estimator="antithetic"),
}
EXAMPLES = 4


def measured_per_example(
    kind: Kind, name: str, count: int, mu: float = SMALL_STEP, seed: int = 0
) -> Found:
    """The same of one direction for each of 4 examples, <c, W a> each, or for each of 2 pairs.

    The examples of "unlike" pairs have losses of their own; all others have the same one.
    """
    weight = torch.zeros(kind.rows, kind.columns, dtype=torch.float64)
    row = torch.zeros(EXAMPLES, kind.columns, dtype=torch.float64)
    row[:, 0] = 1.0
    own = torch.linspace(-1, 1, EXAMPLES, dtype=torch.float64) * (name.endswith("unlike"))
    optimizer = HybridZOFO(
        [{"params": [weight], "mode": "zo", "lr": 1.0, "mu": mu}],
        **{**PER_EXAMPLE[name], "directions": "per_example", "perturbation": "streamed"},
        **{**kind.options(), "seed": seed},
    )

    def losses() -> Tensor:
        return torch.nn.functional.linear(row, weight)[:, 0] + own

    found = torch.empty(count, kind.d, dtype=torch.float64)
    for place in range(count):
        weight.zero_()
        optimizer.zero_grad()
        optimizer.step(losses)
        found[place] = -weight.flatten()
    gradient = torch.zeros(kind.rows, kind.columns, dtype=torch.float64)
    gradient[0, 0] = 1.0
    directions = EXAMPLES // (2 if "antithetic" in name else 1)
    return Found(kind, Case(1.0, mu, odd), found, gradient.flatten(), directions)


def lemma(count: int, track: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """All kinds, cases and estimators."""
    rows = []

    def add(name: str, case: str, found: Found) -> None:
        about = {"estimator": name, "kind": found.kind.name, "d": found.kind.d, "case": case}
        rows.append({**about, **found.summary()})

    for kind in KINDS:
        track(f"Lemma B.5: {kind.name}")
        for name, options in ESTIMATORS.items():
            for case, what in CASES.items():
                if not (case == "curvature, even" and name != "one-sided"):  # exact on it
                    add(name, case, measured(kind, what, options, count))
    for kind in SMALL:
        for case, what in CASES.items():
            add("one-sided", case, measured(kind, what, ESTIMATORS["one-sided"], count))
    for kind in (kind for kind in KINDS if kind.rank):
        track(f"Lemma B.5, directions for each example: {kind.name}")
        for name in PER_EXAMPLE:
            add(name, "gradient", measured_per_example(kind, name, count))
    return rows
