"""The Hessian's eigenvalue of largest magnitude, by Lanczos' method of scipy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .products import HessianProducts
from .vectors import Parts

_VECTORS = 12
"""That Lanczos' method keeps; smaller matrices are made whole."""
_TOLERANCE = 1e-2
_RESTARTS = 20
SHARP = 0.1
"""Displacements along eigenvectors are that much shorter than those along random directions."""

_RESIDUAL = 0.5
"""What may be left of H u - value u, over the value: products of a matrix leave 0.01, noise 1.

Rounding of differences is in all d elements, and hardly in their sum along u, which is the value.
"""
_WHY = (
    "products are mostly rounding, or the loss is not smooth there; take a larger step, or "
    "method='exact', or leave the eigenvalue out by largest=False"
)

Vector = NDArray[Any]


class NotConverged(RuntimeError):
    """The eigenvalue was not found; the message says why."""


class Eigenvalue(NamedTuple):
    """See :func:`largest_eigenvalue`."""

    value: float
    """Signed."""
    vector: Vector
    """Of length 1, shape (d,): the parameters in order, one after the other; on the host."""


def check_scipy() -> Any:
    """scipy.sparse.linalg.

    Raises:
        ImportError: it is missing.
    """
    try:
        import scipy.sparse.linalg as linalg
    except ImportError as error:
        raise ImportError(
            "largest=True needs scipy: pip install scipy, or zofo-optim[smoothness]; or leave the "
            "eigenvalue out by largest=False"
        ) from error
    return linalg


def largest_eigenvalue(
    products: HessianProducts, *, start: Vector | None = None, seed: int = 0
) -> Eigenvalue:
    """The eigenvalue of largest magnitude, to 1 % of exact products, and its vector.

    By the implicitly restarted Lanczos method (ARPACK); some 12 to 40 products, fewer from a good
    ``start``. It may miss an eigenvalue whose vector is orthogonal to the start, which a random
    one is not.

    Args:
        products: entered.
        start: a vector to begin with, such as the one found before; None: a random one.
        seed: of the random one.

    Raises:
        ImportError: scipy is missing.
        NotConverged: it does not converge, as where products are mostly rounding.
    """
    linalg = check_scipy()
    parts = Parts(products.parameters)
    size, kind = parts.size, np.float64 if parts.dtype == torch.float64 else np.float32

    def multiply(x: Vector) -> Vector:
        v = parts.split(torch.from_numpy(np.ascontiguousarray(x, kind).reshape(-1)))
        hv: Vector = parts.flat(products(v, step=SHARP * products.step)).cpu().numpy()
        return hv

    if size <= _VECTORS:
        columns = np.stack([multiply(row) for row in np.eye(size, dtype=kind)])
        values, vectors = np.linalg.eigh((columns + columns.T) / 2)
        found = int(np.abs(values).argmax())
        return Eigenvalue(float(values[found]), vectors[:, found])
    if start is None:
        start = np.random.default_rng(seed).standard_normal(size).astype(kind)
    if not multiply(start).any():  # flat or linear
        return Eigenvalue(0.0, start / np.linalg.norm(start))
    operator = linalg.LinearOperator((size, size), matvec=multiply, dtype=kind)
    try:
        values, vectors = linalg.eigsh(
            operator, k=1, which="LM", v0=start, ncv=_VECTORS, tol=_TOLERANCE, maxiter=_RESTARTS
        )
    except linalg.ArpackNoConvergence as error:
        raise NotConverged(
            f"Lanczos' method did not end in {_RESTARTS} restarts: {_WHY}"
        ) from error
    value, vector = float(values[0]), vectors[:, 0]
    residual = float(np.linalg.norm(multiply(vector) - value * vector))
    if residual > _RESIDUAL * abs(value):
        raise NotConverged(
            f"H u differs by {residual:.2g} from the eigenvalue's {value:.2g} u: {_WHY}"
        )
    return Eigenvalue(value, vector)
