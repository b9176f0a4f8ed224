"""Which method fits in a memory: peaks of training, rehearsed on the meta device.

::

    from zofo_optim.memory import estimate_memory, which_fits
"""

from .estimate import estimate_memory
from .estimated import MemoryEstimate
from .fitting import Fits, which_fits

__all__ = ["Fits", "MemoryEstimate", "estimate_memory", "which_fits"]
