"""Models with quantised weights: zeroth order learns the scales that go with the integers."""

from .formats import Scale
from .scales import (
    Names,
    Scales,
    check_held,
    check_perturbation,
    named_tensors,
    prepare,
    tensors_for,
)
from .units import as_saved, unit_of

__all__ = [
    "Names",
    "Scale",
    "Scales",
    "as_saved",
    "check_held",
    "check_perturbation",
    "named_tensors",
    "prepare",
    "tensors_for",
    "unit_of",
]
