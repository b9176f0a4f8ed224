"""Which learning rates to start with."""

from .first_order import FirstOrder
from .outcomes import RangeTest
from .perturbation_size import PerturbationSize
from .range_test import LearningRates, find_lr
from .rates import Rates
from .suggestion import Suggestion, suggest_hyperparameters
from .zeroth_order import Terms, ZerothOrder

__all__ = [
    "FirstOrder",
    "LearningRates",
    "PerturbationSize",
    "RangeTest",
    "Rates",
    "Suggestion",
    "Terms",
    "ZerothOrder",
    "find_lr",
    "suggest_hyperparameters",
]
