"""The library's optimizer on the problem, as a user would run it, in fp64."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from zofo_optim import HybridZOFO

from .problems import Array, Problem
from .simulation import LEMMA, Rates, Way


class Components:
    """f(x, y; i) in torch, of weights at the start."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        x, y = (torch.from_numpy(start) for start in problem.start())
        self.x = x.requires_grad_(False)
        self.y = y.requires_grad_(True)
        self._b, self._c = (torch.from_numpy(some) for some in problem.slopes())
        self._signs = problem.signs()

    def loss(self, i: int) -> Tensor:
        """Of one component."""
        p, x, y = self.problem, self.x, self.y
        joint = x.sum() / math.sqrt(p.d_x) + y.sum() / math.sqrt(p.d_y)
        own = self._b[i] @ x + self._c[i] @ y + self._signs[i] * p.spread / 2 * (x @ x)
        terms = [own, p.coupling / 2 * joint**2]
        for weight, scale in ((x, p.A), (y, p.B)):
            terms.append(2 * scale * (weight / 2).sinh().square().sum())  # cosh - 1
        return torch.stack(terms).sum()

    def squared_gradient(self) -> float:
        """|grad f|^2."""
        p = self.problem
        with torch.no_grad():
            joint = self.x.sum() / math.sqrt(p.d_x) + self.y.sum() / math.sqrt(p.d_y)
            found = 0.0
            for weight, scale in ((self.x, p.A), (self.y, p.B)):
                slope = scale * weight.sinh() + p.coupling * joint / math.sqrt(len(weight))
                found += float(slope @ slope)
        return found


def optimise(
    problem: Problem,
    rates: Rates,
    epochs: int,
    seed: int,
    way: Way = LEMMA,
    enough: float = 0.0,
) -> Array:
    """|grad f|^2 at the start of each epoch.

    Args:
        way: a negative ``scale`` is ``maximize``, in the zeroth-order group.
        enough: the run ends where the mean of all epochs so far is no more; or where their sum is
            above that of as many as there are to be, so that their mean must be more.
    """
    components = Components(problem)
    optimizer = HybridZOFO(
        [
            {
                **{"params": [components.x], "mode": "zo", "mu": rates.mu},
                **{"lr": rates.lr_zo * abs(way.scale), "maximize": way.scale < 0},
            },
            {"params": [components.y], "mode": "fo", "lr": rates.lr_fo},
        ],
        estimator="two_sided" if way.two_sided else "one_sided",
        distribution="rademacher" if way.rademacher else "gaussian",
        seed=seed,
    )
    random, found, total = np.random.default_rng(seed), [], 0.0
    for epoch in range(epochs):
        found.append(components.squared_gradient())
        total += found[-1]
        hopeless = enough and total > enough * epochs
        if total <= enough * (epoch + 1) or hopeless or not math.isfinite(total):
            break
        draws = random.integers(problem.n, size=problem.n)
        order = draws if way.replacement else random.permutation(problem.n)
        for i in order:
            optimizer.zero_grad()
            optimizer.step(partial(components.loss, int(i)))
    return np.array(found)
