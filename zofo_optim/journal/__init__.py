"""A journal of a zeroth-order training: a few bytes a step, from which the weights are remade.

A projected gradient, a seed and a step number say all about a zeroth-order update (Malladi et al.
2023, section 2.1), so a fine-tuned base model is its starting point and a journal of some hundred
kilobytes.
"""

from .errors import JournalError
from .player import Replayed, replay
from .reader import Recording, read
from .writer import Journal

__all__ = ["Journal", "JournalError", "Recording", "Replayed", "read", "replay"]
