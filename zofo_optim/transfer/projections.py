"""Linear maps between the activations of two models, fitted on paired rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

METHODS = ("procrustes", "least_squares", "same")
"""The first is the default."""
RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried for least squares, in units of the mean square of an input; 0 only where rows suffice."""

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
        offset: see :data:`Offset`.
    """
    means = [rows.fitted.double().mean(0) * (offset != "none") for rows in (source, target)]
    (x, held_x), (y, held_y) = (
        (rows.fitted.double() - mean, rows.held.double() - mean)
        for rows, mean in zip((source, target), means, strict=True)
    )
    matrix = _procrustes(x, y) if method == "procrustes" else _ridge(x, y, held_x, held_y)
    shift = (means[1] - matrix @ means[0]).float() if offset == "affine" else None
    return measured(Projection(matrix.float(), shift), source, target, offset)


def _procrustes(x: Tensor, y: Tensor) -> Tensor:
    narrows = y.shape[1] < x.shape[1]
    u, _, vh = torch.linalg.svd(x.T @ y if narrows else y.T @ x, full_matrices=False)
    matrix: Tensor = (u @ vh).T if narrows else u @ vh
    mapped = x @ matrix.T
    scale: Tensor = torch.linalg.vector_norm(y) / torch.linalg.vector_norm(mapped).clamp_min(1e-300)
    return matrix * scale


def _ridge(x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x.T @ x)
    values = values.clamp_min(0)
    along = vectors.T @ (x.T @ y)
    in_held = held_x @ vectors
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
