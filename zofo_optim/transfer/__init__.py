"""Adapters for a large model without its gradients (Jin, Zhang, Zong, EMNLP 2023).

Train an adapter on a small model of the family, or on a bridge (a slice of the large model), and
carry it to the large one::

    from zofo_optim.transfer import transfer_adapter
"""

from .adapter import transfer_adapter
from .report import Carried, TransferReport

__all__ = ["Carried", "TransferReport", "transfer_adapter"]
