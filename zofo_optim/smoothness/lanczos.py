"""The ends of a symmetric operator's spectrum, by a fixed number of products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Ends(NamedTuple):
    """See :func:`spectrum_ends`."""

    largest: float
    """A lower bound of the largest eigenvalue."""
    smallest: float
    """An upper bound of the smallest one."""
    largest_error: float
    """Some eigenvalue is as near to ``largest`` as this."""
    vector: Tensor
    """The sum of both ends' approximate eigenvectors: where a next call may start."""

    @property
    def extreme(self) -> float:
        """The one of larger magnitude."""
        return max(self.largest, self.smallest, key=abs)


def spectrum_ends(product: Callable[[Tensor], Tensor], start: Tensor, products: int) -> Ends:
    """By Lanczos's method with full reorthogonalisation, and a product more for each end.

    Unlike ARPACK it always ends after this number of products, with what is best by then, which is
    how a run is watched; the next measurement goes on from the vector. Ends are v' H v of the
    approximate eigenvectors, by products of their own: rounding of products that come from
    differences inflates Lanczos's own values, but not these. Takes the memory of ``products``
    vectors, on their device.

    Args:
        product: H v of a unit vector v.
        start: not 0, shape (d,).
        products: at least 1; fewer are made where the vectors span a space that H maps into itself.
    """
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    v = start / start.norm()
    for _ in range(min(products, v.numel())):
        basis.append(v)
        w = product(v)
        diagonal.append(torch.dot(w, v).item())
        size = w.norm().item()
        for _ in range(2):  # once leaves what rounding brings
            for known in basis:
                w = w - torch.dot(w, known) * known
        beside.append(w.norm().item())
        if not beside[-1] > 1e-6 * max(size, abs(diagonal[0])):
            break
        v = w / beside[-1]
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for place, value in enumerate(beside[:-1]):
        matrix[place, place + 1] = matrix[place + 1, place] = value
    vectors = torch.linalg.eigh(matrix).eigenvectors
    top, bottom = _sum(vectors[:, -1], basis), _sum(vectors[:, 0], basis)
    found = [_quotient(product, end) for end in ((bottom, top) if len(basis) > 1 else (top,))]
    largest, error = max(found)
    return Ends(largest, min(found)[0], error, top + bottom)


def _sum(weights: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """Of length 1, as weights have."""
    found = torch.zeros_like(vectors[0])
    for weight, vector in zip(weights.tolist(), vectors, strict=True):
        found += weight * vector
    return found.div_(found.norm())


def _quotient(product: Callable[[Tensor], Tensor], v: Tensor) -> tuple[float, float]:
    """v' H v, and how far H v is from that multiple of v."""
    hv = product(v)
    value = torch.dot(v, hv)
    return value.item(), (hv - value * v).norm().item()
