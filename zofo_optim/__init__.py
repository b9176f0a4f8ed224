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
    "common_noise",
    "example_losses",
    "example_losses_of",
    "find_lr",
    "hybrid_param_groups",
    "load_base_weights",
    "load_hybrid",
    "per_example_gain",
    "replay",
    "save_base_weights",
    "save_hybrid",
    "shape_scores",
    "suggest_hyperparameters",
]
