"""The local smoothness of a loss: the Hessian's norm, trace and largest eigenvalue.

Of the base model and of the adapter, as Ma, Yu, Huang 2026 measure them (App. D.4)::

    from zofo_optim.smoothness import measure_smoothness
"""

from .eigenvalues import Eigenvalue, largest_eigenvalue
from .forward import Along, along_directions, curvature_mu
from .measuring import measure_smoothness
from .products import HessianProducts
from .recorder import SmoothnessRecorder
from .report import BlockSmoothness, Smoothness
from .scatter import HybridSmoothness, fit_hybrid_smoothness, plot_scatter

__all__ = [
    "Along",
    "BlockSmoothness",
    "Eigenvalue",
    "HessianProducts",
    "HybridSmoothness",
    "Smoothness",
    "SmoothnessRecorder",
    "along_directions",
    "curvature_mu",
    "fit_hybrid_smoothness",
    "largest_eigenvalue",
    "measure_smoothness",
    "plot_scatter",
]
