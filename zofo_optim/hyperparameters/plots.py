"""Range tests as a picture."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from ..pictures import COLORS, GREY, figure

if TYPE_CHECKING:
    from .range_test import LearningRates

_SAID = {"zo": "zeroth-order", "fo": "first-order"}


def draw(found: LearningRates, path: str | os.PathLike[str]) -> None:
    """See :meth:`LearningRates.plot`."""
    tests = {mode: test for mode in _SAID if (test := getattr(found, mode)) is not None}
    drawn = figure("LearningRates.plot", (1 + 4 * len(tests), 3.5))
    (axes,) = drawn.subplots(1, len(tests), squeeze=False)
    for axis, (mode, test) in zip(axes, tests.items(), strict=True):
        finite = [math.isfinite(loss) for loss in test.losses]
        shown = [
            pair
            for pair, ok in zip(zip(test.rates, test.losses, strict=True), finite, strict=True)
            if ok
        ]
        axis.plot(*zip(*shown, strict=True), ".", color=GREY, label="loss")
        smooth = test.smoothed
        axis.plot(test.rates[: len(smooth)], smooth, color=COLORS["zo"], label="smoothed")
        if test.lr is not None:
            axis.axvline(test.lr, color=COLORS["fo"], label=f"suggested, {test.lr:.2g}")
        if test.lowest is not None:  # what it rises to in the end would hide the fall
            fall = test.losses[0] - min(smooth)
            axis.set_ylim(test.losses[0] - 1.3 * fall, test.losses[0] + fall)
        axis.set_xscale("log")
        axis.set(xlabel=f"{_SAID[mode]} learning rate", ylabel="loss")
        axis.legend(frameon=False)
    drawn.savefig(path)
