"""Memory-efficient fine-tuning by hybrid zeroth- and first-order optimisation."""

from .active import Cycle, Draw
from .base_weights import load_base_weights, save_base_weights
from .gain import Gain, per_example_gain
from .groups import hybrid_param_groups
from .hyperparameters import (
    LearningRates,
    Suggestion,
    find_lr,
    suggest_hyperparameters,
)
from .journal import Journal, replay
from .listeners import Listener
from .losses import example_losses, example_losses_of
from .optimizer import HybridZOFO
from .quantized.side_saving import load_side_updates, save_side_updates
from .quantized.side_updates import add_side_updates, remove_side_updates
from .rewards import shape_scores
from .rules import CenteredRank, Clip, Normalized, Rule, Sign, ZScore
from .sampling import common_noise
from .saving import load_hybrid, save_hybrid

__version__ = "0.2.0"
__all__ = [
    "CenteredRank",
    "Clip",
    "Cycle",
    "Draw",
    "Gain",
    "HybridZOFO",
    "Journal",
    "LearningRates",
    "Listener",
    "Normalized",
    "Rule",
    "Sign",
    "Suggestion",
    "ZScore",
    "__version__",
    "add_side_updates",
    "common_noise",
    "example_losses",
    "example_losses_of",
    "find_lr",
    "hybrid_param_groups",
    "load_base_weights",
    "load_hybrid",
    "load_side_updates",
    "per_example_gain",
    "remove_side_updates",
    "replay",
    "save_base_weights",
    "save_hybrid",
    "save_side_updates",
    "shape_scores",
    "suggest_hyperparameters",
]
