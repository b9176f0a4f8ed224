"""Memory-efficient fine-tuning by hybrid zeroth- and first-order optimisation."""

from .groups import hybrid_param_groups
from .journal import Journal, replay
from .optimizer import HybridZOFO

__version__ = "0.1.0"
__all__ = ["HybridZOFO", "Journal", "__version__", "hybrid_param_groups", "replay"]
