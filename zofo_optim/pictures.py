"""Figures of matplotlib, an extra that few need, and the colours of the modes in them."""

from __future__ import annotations

from typing import Any

COLORS = {"fo": "#d1495b", "zo": "#30638e"}
GREY = "#b0b0b0"


def figure(who: str, size: tuple[float, float]) -> Any:
    """A new figure, of ``size`` in inches.

    Raises:
        ImportError: matplotlib is missing, which ``who`` needs.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{who} needs matplotlib: pip install matplotlib, or zofo-optim[experiments]"
        ) from error
    return Figure(figsize=size, layout="constrained")
