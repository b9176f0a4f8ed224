"""Models with quantised weights: zeroth order learns their scales, or updates beside them."""

from .formats import Scale
from .scales import (
    LearningScales,
    Names,
    Scales,
    check_held,
    check_perturbation,
    codes,
    named_as_scales,
    named_tensors,
    prepare,
    scaled_weights,
    tensors_for,
)
from .side_updates import add_side_updates, note_beside, remove_side_updates, side_updates
from .units import as_saved, unit_of

__all__ = [
    "LearningScales",
    "Names",
    "Scale",
    "Scales",
    "add_side_updates",
    "as_saved",
    "check_held",
    "check_perturbation",
    "codes",
    "named_as_scales",
    "named_tensors",
    "note_beside",
    "prepare",
    "remove_side_updates",
    "scaled_weights",
    "side_updates",
    "tensors_for",
    "unit_of",
]
