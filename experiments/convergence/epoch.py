"""One epoch's inequality, step 4 of the proof in docs/theory.md, on quadratics, where it is exact.

Units are those in which L = M = 1, and the start is 0: component i is z H_i z / 2 + g_i z, with
|H_i| <= 1. Means and second moments of z follow from step to step in closed form, so that E f
after an epoch is a mean over the orders of components, without sampling.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from .problems import Array


@dataclass(frozen=True)
class Inequality:
    """The constants of steps 3 to 5: the rates' limits, and what an epoch leaves and adds."""

    limit_x: float = 1 / 72
    """lr_zo L n (d + 2) at most."""
    limit_y: float = 1 / 2
    """lr_fo M n at most."""
    left: float = 1 / 4
    """Of lr n |grad f|^2, in both blocks: this at least."""
    noise_x: float = 18.0
    """Times (d + 2) n L lr_zo^2 sigma_x^2."""
    noise_y: float = 5 / 16
    """Times n M lr_fo^2 sigma_y^2."""
    by_mu: float = 4.42
    """Times n L lr_zo^2 kappa; a quadratic's estimates have no bias."""

    def harder(self, name: str, factor: float) -> Inequality:
        """With larger limits, more left, or less added."""
        value = getattr(self, name)
        added = name.startswith("noise") or name == "by_mu"
        return replace(self, **{name: value / factor if added else value * factor})

    def excess(self, epoch: Epoch) -> float:
        """Left side less right side, over the sum of their magnitudes: violated above 0."""
        left = self.left * epoch.descent
        added = self.noise_x * epoch.noise_x + self.noise_y * epoch.noise_y
        added += self.by_mu * epoch.by_mu
        whole = abs(epoch.change) + left + added
        return float((epoch.change + left - added) / whole) if whole else 0.0


PROVEN = Inequality()


class Epoch(NamedTuple):
    """E f after an epoch less f before it, and what the constants multiply."""

    change: float
    descent: float
    noise_x: float
    noise_y: float
    by_mu: float


@dataclass(frozen=True)
class Quadratics:
    """Components: Hessians, shape (n, D, D), gradients at the start, (n, D), and d of the D."""

    hessians: Array
    gradients: Array
    d: int

    def epoch(self, zo: float, fo: float, mu: float, signs: bool = False) -> Epoch:
        """With lr_zo L n (d + 2) = ``zo`` and lr_fo M n = ``fo``."""
        n, d = len(self.gradients), self.d
        lr_zo, lr_fo = zo / (n * (d + 2)), fo / n
        slope = self.gradients.mean(0)
        variance = ((self.gradients - slope) ** 2).mean(0)
        kappa = mu**2 * d * (d + 2) * (d + 4) / 2
        return Epoch(
            self.change(lr_zo, lr_fo, mu, signs),
            n * (lr_zo * (slope[:d] ** 2).sum() + lr_fo * (slope[d:] ** 2).sum()),
            (d + 2) * n * lr_zo**2 * variance[:d].sum(),
            n * lr_fo**2 * variance[d:].sum(),
            n * lr_zo**2 * kappa,
        )

    def change(self, lr_zo: float, lr_fo: float, mu: float, signs: bool = False) -> float:
        """E f after an epoch less f before it; one-sided estimates, Gaussian directions or ±1.

        With ±1 mu must be 0, which is the two-sided estimate of a quadratic.
        """
        d, whole, slope = self.d, self.hessians.mean(0), self.gradients.mean(0)
        rates = np.where(np.arange(len(slope)) < d, lr_zo, lr_fo)
        changes = []
        for order in itertools.permutations(range(len(self.gradients))):
            mean, second = np.zeros_like(slope), np.zeros_like(whole)
            for i in order:
                H, g = self.hessians[i], self.gradients[i]
                joint = np.outer(H @ mean, g)
                squares = H @ second @ H + joint + joint.T + np.outer(g, g)  # E of gradients
                squares[:d, :d] = fourth(squares[:d, :d], signs) + mu**2 / 4 * sixth(H[:d, :d])
                along = (second @ H + np.outer(mean, g)) * rates
                second = second - along - along.T + squares * np.outer(rates, rates)
                mean = mean - rates * (H @ mean + g)
            changes.append((whole * second).sum() / 2 + slope @ mean)
        return float(np.mean(changes))


def fourth(A: Array, signs: bool) -> Array:
    """E v v' A v v'."""
    both: Array = np.trace(A) * np.eye(len(A)) + 2 * A
    if signs:
        both -= 2 * np.diag(np.diag(A))
    return both


def sixth(H: Array) -> Array:
    """E (v' H v)^2 v v' for Gaussian v."""
    trace, square = np.trace(H), H @ H
    both: Array = (trace**2 + 2 * np.trace(square)) * np.eye(len(H))
    both += 4 * trace * H + 8 * square
    return both


def problems(count: int, random: Generator) -> Iterator[tuple[Quadratics, float]]:
    """Quadratics with curvatures at their bounds, and a mu: equal, opposite, coupled and random
    Hessians; gradients and noise of all relative sizes, and none."""
    for number in range(count):
        d, d_y, n = random.integers(1, 4), random.integers(1, 3), random.integers(1, 4)
        D, kind = d + d_y, number % 4
        hessians = np.empty((n, D, D))
        for H in hessians:
            if kind < 2:
                H[:] = np.eye(D) * (random.choice([-1, 1]) if kind else 1)
            elif kind == 2:
                q = random.standard_normal(D)
                H[:] = np.outer(q, q) * random.choice([-1, 1])
            else:
                A = random.standard_normal((D, D))
                H[:] = A + A.T
            H /= np.linalg.norm(H, 2)
        parts = np.where(np.arange(D) < d, *size(random, 2))
        noise = np.where(np.arange(D) < d, *size(random, 2))
        spread = random.standard_normal((n, D)) * noise
        gradients = random.standard_normal(D) * parts + spread - spread.mean(0)
        yield Quadratics(hessians, gradients, int(d)), float(size(random, 1)[0])


FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


def power(count: int) -> list[dict[str, Any]]:
    """How many of the problems violate the inequality with a constant off by each factor."""
    some = list(problems(count, np.random.default_rng(0)))
    rows = []
    for one in fields(Inequality):
        violated = []
        for factor in FACTORS:
            changed = PROVEN.harder(one.name, factor)
            epochs = (q.epoch(changed.limit_x, changed.limit_y, mu) for q, mu in some)
            violated.append(sum(changed.excess(epoch) > 1e-9 for epoch in epochs))
        row = {"constant": one.name, "value": getattr(PROVEN, one.name), "problems": count}
        rows.append({**row, "factors": list(FACTORS), "violated": violated})
    return rows


def size(random: Generator, count: int) -> Array:
    """0 one time in three, else from 0.01 to 10."""
    found: Array = (random.random(count) > 1 / 3) * 10 ** random.uniform(-2, 1, count)
    return found
