"""Train a model that is larger than memory: frozen weights live in a private file.

:func:`offload_weights` moves them there; ``perturbation="streamed"`` then trains them.
"""

from .handle import Offload
from .offloading import offload_weights

__all__ = ["Offload", "offload_weights"]
