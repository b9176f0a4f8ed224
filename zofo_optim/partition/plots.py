"""A partition as a picture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..pictures import COLORS, GREY, figure

if TYPE_CHECKING:
    from .partition import Partition

_COLORS = {**COLORS, "frozen": GREY}
_SAID = {"fo": "first-order", "zo": "zeroth-order", "frozen": "frozen"}
_NAMED = 60
"""So many tensors are told by name."""


def draw(partition: Partition, path: str | os.PathLike[str]) -> None:
    """Importance above, cost below, a bar for each tensor; see :meth:`Partition.plot`."""
    rows = partition.rows
    named = 0 < len(rows) <= _NAMED
    size = (min(4 + 0.12 * len(rows), 16), 7 if named else 5)
    drawn = figure("Partition.plot", size)
    from matplotlib.patches import Patch

    above, below = drawn.subplots(2, 1, sharex=True)
    colors = [_COLORS[row.mode] for row in rows]
    places = range(len(rows))
    if any(row.importance is not None for row in rows):
        above.bar(places, [row.importance or 0.0 for row in rows], color=colors)
        above.set_ylabel("importance")
    else:
        above.bar(places, [row.flops for row in rows], color=colors)
        above.set_ylabel("FLOPs")
    flops = partition.of == "flops"
    below.bar(places, [row.flops if flops else row.bytes for row in rows], color=colors)
    below.set_ylabel("FLOPs" if flops else "bytes")
    below.set_xlabel("depth: tensors from the loss down")
    if named:
        below.set_xticks(list(places), [row.name for row in rows], rotation=90, fontsize=6)
    present = [mode for mode in _COLORS if any(row.mode == mode for row in rows)]
    above.legend(handles=[Patch(color=_COLORS[mode], label=_SAID[mode]) for mode in present])
    above.set_title(f"policy {partition.policy}, budget {partition.budget} of {partition.of}")
    drawn.savefig(path)
