"""A problem with hybrid generalised smoothness, whose constants are known in closed form.

    f(x, y; i) = A sum_k (cosh x_k - 1) + B sum_k (cosh y_k - 1) + (C/2) (u x + w y)^2
                 + b_i x + s_i (K/2) |x|^2 + c_i y,

with unit vectors u and w of equal elements, linear terms that sum to 0 over i, and signs s_i that
do, too. So f* = 0 at 0. Curvature grows like the gradient, l(t) = A + t: f is not L-smooth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from zofo_optim.theory import Constants, StepSizes, theorem_step_sizes

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Sizes and scales; the start is where all elements of x are alike, and all of y."""

    d_x: int = 4
    d_y: int = 2
    n: int = 2
    A: float = 10.0
    B: float = 1.0
    coupling: float = 0.1
    """C."""
    spread: float = 0.0
    """K: how the components' curvatures differ; n must be even."""
    noise: float = 1.0
    """Root mean square of |b_i|."""
    noise_fo: float = 0.0
    """Root mean square of |c_i|."""
    gap_zo: float = 0.05
    """The part of f - f* at the start that is in x."""
    gap_fo: float = 0.05
    reach: float = 0.05
    """How far an element may leave the sub-level set in an epoch, or displaced."""

    def start(self) -> tuple[Array, Array]:
        """x and y, shapes (d_x,) and (d_y,); signs alternate, so that the coupling is 0."""
        x = math.acosh(1 + self.gap_zo / (self.A * self.d_x))
        y = math.acosh(1 + self.gap_fo / (self.B * self.d_y))
        return x * alternating(self.d_x), y * alternating(self.d_y)

    @property
    def gap(self) -> float:
        """f - f* at the start."""
        return self.value(*self.start())

    def value(self, x: Array, y: Array) -> float:
        """f."""
        joint = x.sum() / math.sqrt(self.d_x) + y.sum() / math.sqrt(self.d_y)
        whole = self.A * (np.cosh(x) - 1).sum() + self.B * (np.cosh(y) - 1).sum()
        return float(whole + self.coupling / 2 * joint**2)

    def slopes(self, seed: int = 0) -> tuple[Array, Array]:
        """b and c, shapes (n, d_x) and (n, d_y)."""
        random = np.random.default_rng(seed)
        found = []
        for d, size in ((self.d_x, self.noise), (self.d_y, self.noise_fo)):
            drawn = random.standard_normal((self.n, d))
            drawn -= drawn.mean(0)
            root = math.sqrt((drawn**2).sum() / self.n)
            found.append(drawn * (size / root) if root else drawn)
        return found[0], found[1]

    def signs(self) -> Array:
        """s, shape (n,)."""
        if self.spread and self.n % 2:
            raise ValueError(f"n must be even for components to differ in curvature, got {self.n}")
        return alternating(self.n) if self.n % 2 == 0 else np.zeros(self.n)

    def constants(self, level: float) -> Constants:
        """Those of the sub-level set f - f* <= level, and what is within `reach` of it.

        There A (cosh x_k - 1) <= level. The coupling's Hessian is at most 2 C diag(I, I), its
        gradient has norm sqrt(2) C |u x + w y|, and |x|^2 <= 2 level / A.
        """
        curvatures = [
            scale * math.cosh(math.acosh(1 + level / scale) + self.reach) + 2 * self.coupling
            for scale in (self.A, self.B)
        ]
        gradient = math.sqrt(level * (2 * max(self.A, self.B) + level))
        differs = self.noise + self.spread * math.sqrt(2 * level / self.A)
        return Constants(
            L_x=curvatures[0],
            L_y=curvatures[1],
            L_x_max=curvatures[0] + self.spread,
            L_y_max=curvatures[1],
            sigma=math.hypot(differs, self.noise_fo),
            G=gradient + 2 * math.sqrt(self.coupling * level),
            gap=self.gap,
            d_x=self.d_x,
            n=self.n,
        )

    def sizes(self, epsilon: float, delta: float, proof: str = "paper") -> StepSizes:
        """The theorem's step sizes, at a level that the constants hold on."""
        level = 4 * self.gap / delta
        while True:
            found = theorem_step_sizes(
                self.constants(level), epsilon=epsilon, delta=delta, proof=proof
            )
            if found.level <= level * (1 + 1e-12):
                return found
            level = found.level

    def gradient_norm(self) -> float:
        """Of f at the start."""
        x, y = self.start()
        return float(np.hypot(self.A * norm(np.sinh(x)), self.B * norm(np.sinh(y))))

    def but(self, **changes: float) -> Problem:
        """The same with other scales or sizes."""
        return replace(self, **changes)  # type: ignore[arg-type]


def alternating(count: int) -> Array:
    """1, -1, 1, ..."""
    return np.where(np.arange(count) % 2, -1.0, 1.0)


def norm(vector: Array) -> float:
    return float(np.sqrt((vector**2).sum()))
