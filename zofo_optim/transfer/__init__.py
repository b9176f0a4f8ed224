"""Adapters for a large model without its gradients (Jin, Zhang, Zong, EMNLP 2023).

Train an adapter on a small model of the family, or on a bridge (a slice of the large model), and
carry it to the large one::

    from zofo_optim.transfer import bridge_model, transfer_adapter
"""

from .adapter import transfer_adapter
from .bottleneck_files import bottleneck_state, load_bottlenecks, save_bottlenecks
from .bottlenecks import Bottleneck, add_bottlenecks, without_bottlenecks
from .bridge import bridge_model
from .groups import zo_param_groups
from .report import Carried, TransferReport

__all__ = [
    "Bottleneck",
    "Carried",
    "TransferReport",
    "add_bottlenecks",
    "bottleneck_state",
    "bridge_model",
    "load_bottlenecks",
    "save_bottlenecks",
    "transfer_adapter",
    "without_bottlenecks",
    "zo_param_groups",
]
