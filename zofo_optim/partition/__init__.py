"""Which tensors of one model train first-order, and which zeroth-order, within a budget.

Hi-ZFO's partition (Jin, Tan, ACL Findings 2026), and others beside it::

    from zofo_optim.partition import importance_partition
"""

from .making import importance_partition, make_partition
from .partition import Partition, Row
from .policies import POLICIES
from .presets import HiZFO, hi_zfo

__all__ = [
    "POLICIES",
    "HiZFO",
    "Partition",
    "Row",
    "hi_zfo",
    "importance_partition",
    "make_partition",
]
