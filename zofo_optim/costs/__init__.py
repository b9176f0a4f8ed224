"""What first-order training of some of a model's tensors costs, in FLOPs and bytes.

Counted from one forward pass, also on the meta device::

    from zofo_optim.costs import costs_of
"""

from .costs import Costs, TensorCost
from .profiling import costs_of

__all__ = ["Costs", "TensorCost", "costs_of"]
