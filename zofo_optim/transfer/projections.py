"""Linear maps between the activations of two models, fitted on paired rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

METHODS = ("procrustes", "least_squares", "same")
"""The first is the default."""
RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried for least squares, in units of the mean square of an input; 0 only where rows suffice."""
RECENT = 3
"""Decompositions that are kept: of what a module reads, of a map of what it writes, and back."""

Offset = Literal["none", "centred", "affine"]
"""What a map does about means. "none": it goes through 0, for inputs of a matrix. "centred": it
maps deviations from the mean, for changes of outputs. "affine": it has an offset, for points."""


class Rows(NamedTuple):
    """Rows of one activation of a model, float32 on the CPU."""

    fitted: Tensor
    """(n, width): what maps are fitted on."""
    held: Tensor
    """(m, width): of other texts; errors are measured on them."""


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map from one model's activations to another's.

    Attributes:
        matrix: (out, in), float32.
        offset: (out,), or None.
        error: relative, of the held rows: ‖mapped - wanted‖ / ‖wanted‖ (Frobenius norms; of
            deviations from the mean where it maps those). None where nothing was measured.
    """

    matrix: Tensor
    offset: Tensor | None = None
    error: float | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """(n, in) to (n, out)."""
        mapped = rows @ self.matrix.T
        return mapped if self.offset is None else mapped + self.offset


def selection(kept: Tensor | None, of: int) -> Projection:
    """Takes the units ``kept`` of so many, in that order; None: all of them."""
    identity = torch.eye(of)
    return Projection(identity if kept is None else identity[kept])


def measured(projection: Projection, source: Rows, target: Rows, offset: Offset) -> Projection:
    """The same with its error on the held rows."""
    mapped, wanted = projection(source.held), target.held
    if offset == "centred":
        mapped = mapped - projection(source.fitted.mean(0, keepdim=True))
        wanted = wanted - target.fitted.mean(0)
    return Projection(projection.matrix, projection.offset, relative(mapped, wanted))


def relative(mapped: Tensor, wanted: Tensor) -> float:
    """‖mapped - wanted‖ / ‖wanted‖; 0 where both are 0."""
    missed = float(torch.linalg.vector_norm(mapped - wanted))
    return missed / float(torch.linalg.vector_norm(wanted)) if missed else 0.0


def fit(source: Rows, target: Rows, method: str, offset: Offset) -> Projection:
    """The map by which ``source`` tells ``target`` best; float64 within.

    Args:
        source, target: paired rows, (n, in) and (n, out).
        method: "least_squares", with the ridge of :data:`RIDGES` that has the smallest error on
            the held rows; or "procrustes": orthonormal columns (rows, where it narrows) times one
            scale, by which mapped rows are as large as those that are wanted. Where it narrows, it
            is the transpose of what widens best, as the narrowing problem has no closed form.
            Zero where no ridge beats zero on the held rows, or fitted rows are zero.
        offset: see :data:`Offset`.
    """
    return Fits().fit(source, target, method, offset)


class Fits:
    """Maps one after the other: what some of the last ones share is computed once.

    That is the eigendecomposition of a source, for least squares, and the rotation between two
    activations, both ways: query, key and value have one source. Memory: 8 bytes · width · (width +
    held rows), or 8 bytes · both widths, of each of the last :data:`RECENT`.
    """

    def __init__(self) -> None:
        self._recent: dict[Any, Any] = {}

    def fit(self, source: Rows, target: Rows, method: str, offset: Offset) -> Projection:
        """See :func:`fit`."""
        centred = offset != "none"
        if method == "procrustes":
            matrix = self._procrustes(source, target, centred)
        else:
            matrix = _ridge(self._once(_spectrum, source, centred), source, target, centred)
        shift = None
        if offset == "affine":
            mean, wanted = (_mean(rows, centred) for rows in (source, target))
            shift = (wanted - matrix @ mean).float()
        return measured(Projection(matrix.float(), shift), source, target, offset)

    def _once(self, make: Callable[..., Any], *of: Any) -> Any:
        key = (make, *of)
        found = self._recent.pop(key) if key in self._recent else make(*of)
        self._recent[key] = found
        for oldest in list(self._recent)[:-RECENT]:
            del self._recent[oldest]
        return found

    def _procrustes(self, source: Rows, target: Rows, centred: bool) -> Tensor:
        narrows = target.fitted.shape[1] < source.fitted.shape[1]
        matrix: Tensor
        if narrows or (_rotation, target, source, centred) in self._recent:
            matrix = self._once(_rotation, target, source, centred).T
        else:
            matrix = self._once(_rotation, source, target, centred)
        x, y = (_deviations(rows, centred)[0] for rows in (source, target))
        size = float(torch.linalg.vector_norm(x @ matrix.T))
        return matrix * (float(torch.linalg.vector_norm(y)) / size if size else 0.0)


class _Spectrum(NamedTuple):
    """Eigenvalues and eigenvectors of a source's second moments; its held rows along these."""

    values: Tensor
    vectors: Tensor
    held: Tensor


def _mean(rows: Rows, centred: bool) -> Tensor:
    return rows.fitted.double().mean(0) * centred


def _deviations(rows: Rows, centred: bool) -> tuple[Tensor, Tensor]:
    """Fitted and held rows, float64, from the mean of what is fitted, or from 0."""
    mean = _mean(rows, centred)
    return rows.fitted.double() - mean, rows.held.double() - mean


def _rotation(narrow: Rows, wide: Rows, centred: bool) -> Tensor:
    """(wide, narrow), with orthonormal columns."""
    x, y = (_deviations(rows, centred)[0] for rows in (narrow, wide))
    u, _, vh = torch.linalg.svd(y.T @ x, full_matrices=False)
    matrix: Tensor = u @ vh
    return matrix


def _spectrum(source: Rows, centred: bool) -> _Spectrum:
    x, held = _deviations(source, centred)
    values, vectors = torch.linalg.eigh(x.T @ x)
    return _Spectrum(values.clamp_min(0), vectors, held @ vectors)


def _ridge(spectrum: _Spectrum, source: Rows, target: Rows, centred: bool) -> Tensor:
    values, vectors, in_held = spectrum
    x, (y, held_y) = _deviations(source, centred)[0], _deviations(target, centred)
    along = vectors.T @ (x.T @ y)
    unit = float(values.mean()) or 1.0
    determined = float(values[0]) > 1e-12 * float(values[-1])
    best: Tensor = torch.zeros_like(along)
    least = float(held_y.square().sum())
    for ridge in RIDGES if determined else RIDGES[1:]:
        solved = along / (values + ridge * unit)[:, None]
        missed = float((in_held @ solved - held_y).square().sum())
        if missed < least:
            best, least = solved, missed
    found: Tensor = (vectors @ best).T
    return found
