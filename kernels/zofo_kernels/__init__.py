"""Noise, perturbation and update of weights: one definition, several backends.

``reference`` is the maths in plain torch, ``cpu`` is numba, ``triton`` serves GPUs; all give the
same integers, and bit-identical weights with Rademacher noise.
"""

from .backend import Backend
from .direction import LARGEST_RANK, NOISE_VERSION, NOISE_VERSIONS, Direction, Shift
from .dispatch import BACKENDS, backend_for, unavailable_reason
from .distributions import DISTRIBUTIONS, Distribution
from .interrupt import interruptible, uninterrupted
from .ops import ROUNDINGS, factors, noise, perturb_, perturbed, replay_, update_
from .program import Pass, Program
from .region import Region, Regions
from .structure import STRUCTURES, Matrix, matrix_of
from .weights import DTYPES, Weights, check_weight

__all__ = [
    "BACKENDS",
    "DISTRIBUTIONS",
    "DTYPES",
    "LARGEST_RANK",
    "NOISE_VERSION",
    "NOISE_VERSIONS",
    "ROUNDINGS",
    "STRUCTURES",
    "Backend",
    "Direction",
    "Distribution",
    "Matrix",
    "Pass",
    "Program",
    "Region",
    "Regions",
    "Shift",
    "Weights",
    "backend_for",
    "check_weight",
    "factors",
    "interruptible",
    "matrix_of",
    "noise",
    "perturb_",
    "perturbed",
    "replay_",
    "unavailable_reason",
    "uninterrupted",
    "update_",
]
