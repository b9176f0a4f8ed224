"""Range tests as a picture."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .range_test import LearningRates

_SAID = {"zo": "zeroth-order", "fo": "first-order"}


def draw(found: LearningRates, path: str | os.PathLike[str]) -> None:
    """See :meth:`LearningRates.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "LearningRates.plot needs matplotlib: pip install matplotlib, or "
            "zofo-optim[experiments]"
        ) from error
    tests = {mode: test for mode in _SAID if (test := getattr(found, mode)) is not None}
    figure = Figure(figsize=(1 + 4 * len(tests), 3.5), layout="constrained")
    (axes,) = figure.subplots(1, len(tests), squeeze=False)
    for axis, (mode, test) in zip(axes, tests.items(), strict=True):
        finite = [math.isfinite(loss) for loss in test.losses]
        shown = [
            pair
            for pair, ok in zip(zip(test.rates, test.losses, strict=True), finite, strict=True)
            if ok
        ]
        axis.plot(*zip(*shown, strict=True), ".", color="#b0b0b0", label="loss")
        smooth = test.smoothed
        axis.plot(test.rates[: len(smooth)], smooth, color="#30638e", label="smoothed")
        if test.lr is not None:
            axis.axvline(test.lr, color="#d1495b", label=f"suggested, {test.lr:.2g}")
        if test.lowest is not None:  # what it rises to in the end would hide the fall
            fall = test.losses[0] - min(smooth)
            axis.set_ylim(test.losses[0] - 1.3 * fall, test.losses[0] + fall)
        axis.set_xscale("log")
        axis.set(xlabel=f"{_SAID[mode]} learning rate", ylabel="loss")
        axis.legend(frameon=False)
    figure.savefig(path)
