"""Fits of generalised smoothness: against data with known constants."""

import math

import numpy as np
import pytest

from zofo_optim.smoothness.scatter import fit_hybrid_smoothness, plot_scatter

pytest.importorskip("scipy")

NORMS = np.geomspace(0.05, 20.0, 60)


@pytest.mark.parametrize(
    ("constant", "slope", "exponent"), [(2.0, 0.5, 1.0), (0.0, 3.0, 0.5), (1.0, 0.2, 1.5)]
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_exact_points_give_their_constants(constant, slope, exponent, scale):
    curvatures = scale * (constant + slope * NORMS**exponent)
    free = fit_hybrid_smoothness(NORMS, curvatures, resamples=2)
    fixed = fit_hybrid_smoothness(NORMS, curvatures, exponent=exponent, resamples=2)
    for fit, tolerance in ((free, 1e-2), (fixed, 1e-9)):
        assert fit.constant / scale == pytest.approx(constant, rel=tolerance, abs=tolerance)
        assert fit.slope / scale == pytest.approx(slope, rel=tolerance)
        assert fit.exponent == pytest.approx(exponent, abs=tolerance)
        assert fit.residual <= tolerance * scale
        assert fit.factor == pytest.approx(1.0, abs=tolerance)
        np.testing.assert_allclose(fit(NORMS), curvatures, rtol=0.02)
    assert fixed.exponent_error == 0.0


def test_errors_are_the_spread_of_fits():
    """Over 60 sets of noisy points, the mean error said is the deviation found, within 35 %."""
    rng = np.random.default_rng(0)
    fits = [
        fit_hybrid_smoothness(
            NORMS, 2 + 0.5 * NORMS + rng.uniform(-1, 1, 60), exponent=1, resamples=50
        )
        for _ in range(60)
    ]
    for name, true in (("constant", 2.0), ("slope", 0.5)):
        values = np.array([getattr(fit, name) for fit in fits])
        said = np.mean([getattr(fit, f"{name}_error") for fit in fits])
        assert said == pytest.approx(values.std(), rel=0.35)
        assert abs(values.mean() - true) < 4 * values.std() / math.sqrt(60)


def test_constants_are_never_negative():
    """Curvature that falls with the gradient: the best non-decreasing curve is its mean."""
    curvatures = 5 / (1 + NORMS)
    for exponent in (None, 1.0):
        fit = fit_hybrid_smoothness(NORMS, curvatures, exponent=exponent, resamples=2)
        assert fit.slope == 0.0
        assert fit.constant == pytest.approx(curvatures.mean())
        assert fit.factor == pytest.approx(curvatures.max() / curvatures.mean())
    steep = fit_hybrid_smoothness(NORMS, NORMS - NORMS.min(), exponent=0.5, resamples=2)
    assert steep.constant == 0.0
    assert steep.slope > 0


def test_the_factor_bounds_all_points():
    rng = np.random.default_rng(1)
    curvatures = (1 + NORMS) * rng.uniform(0.5, 1.5, NORMS.size)
    fit = fit_hybrid_smoothness(NORMS, curvatures, exponent=1.0)
    assert (curvatures <= fit.factor * fit(NORMS) * (1 + 1e-12)).all()
    assert (curvatures > 0.999 * fit.factor * fit(NORMS)).any()
    assert f"{fit.points} points" in str(fit)
    assert " t^1.00, 60 points" in str(fit)  # an exponent that was given has no error
    assert " (± " in str(fit_hybrid_smoothness(NORMS, curvatures)).partition(" t^")[2]


@pytest.mark.parametrize(
    ("norms", "curvatures", "options", "said"),
    [
        ([1, 2, 3], [1, 2, 3], {}, "gradient_norms must hold at least 4"),
        ([1, 2, 3, 4], [1, 2, 3, 4, 5], {}, "as many as gradient_norms, got 5 and 4"),
        ([1, 2, 3, 4], [1, 2, -3, 4], {}, r"curvatures must be finite and >= 0.*-3"),
        ([1, 2, math.nan, 4], [1, 2, 3, 4], {}, "gradient_norms must be finite"),
        ([2, 2, 2, 2], [1, 2, 3, 4], {}, "all equal, got 2.0 4 times"),
        ([1, 2, 3, 4], [1, 2, 3, 4], {"exponent": 2}, r"exponent must be None or .*got 2"),
        ([1, 2, 3, 4], [1, 2, 3, 4], {"resamples": 1}, "resamples must be an int >= 2, got 1"),
    ],
)
def test_what_is_refused(norms, curvatures, options, said):
    with pytest.raises(ValueError, match=said):
        fit_hybrid_smoothness(norms, curvatures, **options)


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    points = {"zo": (NORMS, 1 + NORMS), "fo": ([1.0, 2.0], [0.1, 0.2])}
    plot_scatter(points, tmp_path / "scatter.png")
    assert (tmp_path / "scatter.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="points must hold a point"):
        plot_scatter({"zo": ([], [])}, tmp_path / "none.png")
