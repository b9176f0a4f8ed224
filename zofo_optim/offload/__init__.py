"""Train a model that is larger than memory: frozen weights live in a private file.

:func:`offload_weights` moves them there; ``perturbation="streamed"`` then trains them.
"""

from .offloading import Offload, offload_weights

__all__ = ["Offload", "offload_weights"]
