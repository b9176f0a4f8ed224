"""Curvature against the size of the gradient along a run: what generalised smoothness speaks of."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .plots import draw_scatter

Points = tuple[Sequence[float], Sequence[float]]
"""Norms of gradients, and the curvatures there."""
LARGEST_EXPONENT = 1.99
"""Of those that are fitted: l must grow slower than t^2 (sub-quadratic)."""
_GRID = np.linspace(0.0, LARGEST_EXPONENT, 40)


@dataclass(frozen=True)
class HybridSmoothness:
    """l(t) = constant + slope t^exponent, as fitted by :func:`fit_hybrid_smoothness`.

    Standard errors are those of a bootstrap over points. A constant of 0 is at its bound.
    """

    constant: float
    """L0: the curvature where the gradient vanishes."""
    slope: float
    """L1: in curvature over (gradient norm)^exponent."""
    exponent: float
    """a, in [0, 2); 0 where the slope is 0."""
    constant_error: float
    slope_error: float
    exponent_error: float
    """0 where the exponent was given."""
    residual: float
    """Root mean square distance of the curvatures from l."""
    factor: float
    """The least c >= 0 with curvature <= c l(t) at all points: c l is a bound on them."""
    points: int

    def __call__(self, gradient_norms: Any) -> NDArray[np.float64]:
        """l at these norms, in the same shape."""
        return self.constant + self.slope * np.asarray(gradient_norms, float) ** self.exponent

    def __str__(self) -> str:
        fitted = f" (± {self.exponent_error:.1g})" if self.exponent_error else ""
        return (
            f"l(t) = {self.constant:.3g} (± {self.constant_error:.1g}) + {self.slope:.3g} "
            f"(± {self.slope_error:.1g}) t^{self.exponent:.2f}{fitted}, "
            f"{self.points} points, residual {self.residual:.2g}; all lie below {self.factor:.2f} l"
        )


def fit_hybrid_smoothness(
    gradient_norms: Sequence[float],
    curvatures: Sequence[float],
    *,
    exponent: float | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> HybridSmoothness:
    """Fit l(t) = L0 + L1 t^a to curvatures at points of a run, t being the gradient's norm there.

    Hybrid generalised smoothness (Ma, Yu, Huang 2026, Definition 2.1) bounds the Hessian's block
    of each variable by l_x(||grad f||) and l_y(||grad f||), both non-decreasing and sub-quadratic;
    ``exponent=1`` is the (L0, L1)-smoothness of Zhang et al. 2019. Take the norm of the whole
    gradient, and the largest curvature of one block: see :meth:`SmoothnessRecorder.scatter`.

    Least squares with L0, L1 >= 0, so that l is non-decreasing; an exponent that is not given is
    the best in [0, 1.99]. The fit goes through the points, where the definition has a bound:
    ``factor`` times l bounds these points. That does not prove the definition, which speaks of all
    weights and not of those that one run visited; nor does L1 > 0 prove that curvature follows the
    gradient, as both may fall along a run for another reason. Errors take points as independent,
    and those of one run are not: the true ones are larger. Where the norms span less than a factor
    of about 10, exponents are hardly told apart, and the errors of all three say so.

    Needs scipy. Takes some 0.3 s for 100 points with an exponent that is fitted.

    Args:
        gradient_norms: >= 0, shape (points,), not all equal.
        curvatures: >= 0, as many.
        exponent: a in (0, 2); None: fitted.
        resamples: of the bootstrap, at least 2.
        seed: of the bootstrap.

    Returns:
        :class:`HybridSmoothness`.

    Raises:
        ValueError: an argument out of its range, or fewer than 4 points.
        ImportError: scipy is not there.
    """
    t, c = _points(gradient_norms, curvatures)
    if exponent is not None and not 0 < exponent < 2:
        raise ValueError(f"exponent must be None or a number in (0, 2), got {exponent!r}")
    if not isinstance(resamples, int) or isinstance(resamples, bool) or resamples < 2:
        raise ValueError(f"resamples must be an int >= 2, got {resamples!r}")
    best = _fit(t, c, exponent)
    draws = np.random.default_rng(seed).integers(len(t), size=(resamples, len(t)))
    found = [_fit(t[d], c[d], exponent) for d in draws if np.ptp(t[d]) > 0]
    errors = np.std(found, axis=0, ddof=1) if len(found) > 1 else np.full(3, math.nan)
    constant, slope, power = best
    fitted = constant + slope * t**power
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(c > 0, c / fitted, 0.0).max()
    return HybridSmoothness(
        constant=constant,
        slope=slope,
        exponent=power,
        constant_error=float(errors[0]),
        slope_error=float(errors[1]),
        exponent_error=float(errors[2]),
        residual=math.sqrt(np.mean((c - fitted) ** 2)),
        factor=float(factor),
        points=len(t),
    )


def plot_scatter(
    points: Mapping[str, Points],
    path: str | os.PathLike[str],
    fits: Mapping[str, HybridSmoothness] | None = None,
) -> None:
    """Draw curvature against the gradient's norm, and fitted curves. Needs matplotlib.

    Args:
        points: by block, as :meth:`SmoothnessRecorder.scatter` gives them.
        path: of the image; its ending says the format.
        fits: curves by block; None: fitted here, where a block has 4 points.

    Raises:
        ImportError: matplotlib is not there, or scipy where curves are to be fitted.
        ValueError: there is no point; or fitted as :func:`fit_hybrid_smoothness`.
    """
    points = {name: tuple(map(list, pair)) for name, pair in points.items()}  # type: ignore[misc]
    if not any(pair[0] for pair in points.values()):
        raise ValueError(f"points must hold a point, got none of {list(points)}")
    if fits is None:
        many = {name: pair for name, pair in points.items() if _spans(pair[0])}
        fits = {name: fit_hybrid_smoothness(*pair) for name, pair in many.items()}
    draw_scatter(points, fits, path)


def _spans(norms: Sequence[float]) -> bool:
    return len(norms) >= 4 and max(norms) > min(norms)


def _points(norms: Sequence[float], curvatures: Sequence[float]) -> tuple[Any, Any]:
    found = []
    for name, values in (("gradient_norms", norms), ("curvatures", curvatures)):
        array = np.asarray(values, dtype=float)
        if array.ndim != 1 or array.size < 4:
            raise ValueError(f"{name} must hold at least 4 numbers, got shape {array.shape}")
        if not np.isfinite(array).all() or (array < 0).any():
            bad = array[~(np.isfinite(array) & (array >= 0))][0]
            raise ValueError(f"{name} must be finite and >= 0 (take sizes), got {bad}")
        found.append(array)
    t, c = found
    if t.shape != c.shape:
        raise ValueError(f"curvatures must be as many as gradient_norms, got {c.size} and {t.size}")
    if np.ptp(t) == 0:
        raise ValueError(f"gradient_norms must not be all equal, got {t[0]} {t.size} times")
    return t, c


def _fit(t: Any, c: Any, exponent: float | None) -> tuple[float, float, float]:
    """(L0, L1, a) by least squares; the residual has several minima in a, so a grid comes first."""
    try:
        from scipy.optimize import minimize_scalar, nnls
    except ImportError as error:
        raise ImportError(
            "fit_hybrid_smoothness needs scipy: pip install scipy, or zofo-optim[smoothness]"
        ) from error
    scale, height = t.max(), c.max() or 1.0  # of order 1, so that nnls's tolerances are relative
    ones = np.ones_like(t)

    def solve(a: float) -> tuple[Any, float]:
        return nnls(np.stack([ones, (t / scale) ** a], axis=1), c / height)  # type: ignore[no-any-return]

    a = exponent
    if a is None:
        distances = [solve(value)[1] for value in _GRID]
        place = int(np.argmin(distances))
        around = _GRID[max(place - 1, 0)], _GRID[min(place + 1, len(_GRID) - 1)]
        refined = minimize_scalar(lambda value: solve(value)[1], bounds=around, method="bounded")
        a = float(refined.x) if refined.fun < distances[place] else float(_GRID[place])
    (constant, slope), _ = solve(a)
    if a == 0.0:  # both columns are ones
        constant, slope = constant + slope, 0.0
    if slope == 0.0:
        a = a if exponent is not None else 0.0
    return float(constant * height), float(slope * height / scale**a), a
