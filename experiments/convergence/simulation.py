"""Algorithm 1 on the problem, compiled: many seeds, and many epochs. Knows nothing of the library.

The library's optimizer runs the same problem in optimizer.py, for fewer epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from .problems import Array, Problem


@dataclass(frozen=True)
class Rates:
    """What a run takes."""

    lr_zo: float
    lr_fo: float
    mu: float


@dataclass(frozen=True)
class Way:
    """How a run goes: by default as in Lemma B.5 and Algorithm 1."""

    two_sided: bool = False
    rademacher: bool = False
    replacement: bool = False
    """Whether components are drawn with replacement, and not in random orders."""
    scale: float = 1.0
    """Of the zeroth-order estimate; what is not 1 is a fault."""


LEMMA = Way()


def simulate(
    problem: Problem,
    rates: Rates,
    epochs: int,
    seeds: Sequence[int],
    way: Way = LEMMA,
    every: int = 1,
) -> tuple[Array, Array]:
    """|grad f|^2 at the start of each epoch, and the largest f of a run.

    Args:
        every: so many epochs are averaged; the last ones are left out where they are fewer.

    Returns:
        Shapes (seeds, epochs // every) and (seeds,).
    """
    slopes, starts = problem.slopes(), problem.start()
    squares, highest = np.zeros((len(seeds), epochs // every)), np.empty(len(seeds))
    sizes = np.array([problem.A, problem.B, problem.coupling, problem.spread])
    steps = np.array([rates.lr_zo, rates.lr_fo, rates.mu, way.scale])
    switches = (way.two_sided, way.rademacher, way.replacement)
    for place, seed in enumerate(seeds):
        x, y = (start.copy() for start in starts)
        highest[place] = _run(
            *(
                sizes,
                steps,
                x,
                y,
                *slopes,
                problem.signs(),
                *switches,
                np.random.default_rng(seed),
                every,
                squares[place],
            )
        )
    return squares, highest


def averages(squares: Array) -> Array:
    """(1/T) of the sum over the first T epochs, for all T up to those there are."""
    return squares.cumsum(-1) / np.arange(1, squares.shape[-1] + 1)


def needed(squares: Array, epsilon: float) -> list[int | None]:
    """The epochs after which the average stays at most epsilon^2, for each run; None: it does not.

    The bound must not be below.
    """
    found: list[int | None] = []
    for above in averages(squares) > epsilon**2:
        last = int(above.nonzero()[0].max(initial=-1))
        found.append(None if last == len(above) - 1 else last + 2)
    return found


def compiled(function: Any) -> Any:
    return numba.njit(cache=True, fastmath=False, error_model="numpy")(function)


@compiled
def _value(sizes: Any, x: Any, y_part: float, y_joint: float, b: Any, sign: float) -> float:
    whole, joint, square, linear = 0.0, 0.0, 0.0, 0.0
    for k in range(len(x)):
        half = np.sinh(x[k] / 2)  # cosh - 1 without cancellation
        whole += 2 * half * half
        joint += x[k]
        square += x[k] * x[k]
        linear += b[k] * x[k]
    joint = joint / np.sqrt(len(x)) + y_joint
    curved = sizes[0] * whole + sizes[2] / 2 * joint * joint
    return curved + y_part + linear + sign * sizes[3] / 2 * square  # type: ignore[no-any-return]


@compiled
def _run(
    sizes: Any,
    steps: Any,
    x: Any,
    y: Any,
    b: Any,
    c: Any,
    signs: Any,
    two_sided: bool,
    rademacher: bool,
    replacement: bool,
    random: Any,
    every: int,
    squares: Any,
) -> float:
    A, B, C = sizes[0], sizes[1], sizes[2]
    lr_zo, lr_fo, mu, scale = steps[0], steps[1], steps[2], steps[3]
    n, d_x, d_y = len(b), len(x), len(y)
    v, moved, none = np.empty(d_x), np.empty(d_x), np.zeros(d_x)
    order, highest = np.arange(n), 0.0
    for epoch in range(len(squares) * every):
        joint = x.sum() / np.sqrt(d_x) + y.sum() / np.sqrt(d_y)
        gx = A * np.sinh(x) + C * joint / np.sqrt(d_x)
        gy = B * np.sinh(y) + C * joint / np.sqrt(d_y)
        square = (gx**2).sum() + (gy**2).sum()
        squares[epoch // every] += square / every
        y_part, y_joint = B * (2 * np.sinh(y / 2) ** 2).sum(), y.sum() / np.sqrt(d_y)
        highest = max(highest, _value(sizes, x, y_part, y_joint, none, 0.0))
        if not np.isfinite(square) or highest > 1e9:
            squares[epoch // every :] = np.inf
            return np.inf
        random.shuffle(order)
        for position in range(n):
            i = random.integers(0, n) if replacement else order[position]
            for k in range(d_x):
                if rademacher:
                    v[k] = 1.0 if random.random() < 0.5 else -1.0
                else:
                    v[k] = random.standard_normal()
                moved[k] = x[k] + mu * v[k]
            y_part, y_joint = 0.0, 0.0
            for k in range(d_y):
                half = np.sinh(y[k] / 2)
                y_part += B * 2 * half * half + c[i, k] * y[k]
                y_joint += y[k]
            y_joint /= np.sqrt(d_y)
            slope = _value(sizes, moved, y_part, y_joint, b[i], signs[i])
            if two_sided:
                for k in range(d_x):
                    moved[k] = x[k] - mu * v[k]
                other = _value(sizes, moved, y_part, y_joint, b[i], signs[i])
                slope = (slope - other) / (2 * mu)
            else:
                slope = (slope - _value(sizes, x, y_part, y_joint, b[i], signs[i])) / mu
            joint = x.sum() / np.sqrt(d_x) + y_joint
            for k in range(d_y):
                y[k] -= lr_fo * (B * np.sinh(y[k]) + C * joint / np.sqrt(d_y) + c[i, k])
            for k in range(d_x):
                x[k] -= lr_zo * scale * slope * v[k]
    return highest  # type: ignore[no-any-return]
