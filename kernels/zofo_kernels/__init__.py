"""Noise, perturbation and update of weights: one definition, several backends.

``reference`` is the maths in plain torch, ``cpu`` is numba, ``triton`` serves GPUs; all give the
same integers, and bit-identical weights with Rademacher noise.
"""

from .backend import Backend
from .direction import NOISE_VERSION, NOISE_VERSIONS, Direction, Shift
from .dispatch import BACKENDS, backend_for, unavailable_reason
from .distributions import DISTRIBUTIONS, Distribution
from .interrupt import interruptible, uninterrupted
from .ops import ROUNDINGS, noise, perturb_, perturbed, replay_, update_
from .program import Pass, Program
from .region import Region, Regions
from .weights import DTYPES, Weights, check_weight

__all__ = [
    "BACKENDS",
    "DISTRIBUTIONS",
    "DTYPES",
    "NOISE_VERSION",
    "NOISE_VERSIONS",
    "ROUNDINGS",
    "Backend",
    "Direction",
    "Distribution",
    "Pass",
    "Program",
    "Region",
    "Regions",
    "Shift",
    "Weights",
    "backend_for",
    "check_weight",
    "interruptible",
    "noise",
    "perturb_",
    "perturbed",
    "replay_",
    "unavailable_reason",
    "uninterrupted",
    "update_",
]
