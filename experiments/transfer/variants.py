"""Other ways to carry the adapters of the first seed over: layer maps, projections, scales."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..report import Result
from ..search import SEARCHED
from . import methods
from .grid import BRIDGE, PLUGGED, SMALL, Cell
from .large import Way
from .runs import Searches
from .slices import evenly

MAPS = ("spread", "nearest", "similar")
WIDTHS = ("procrustes", "least_squares", "same")
SCALES = (0.0, 0.5, 1.0, 2.0)
"""Times the change of the weights; the head stays. At 0 it is the head alone."""
ADAPTERS = (Cell(PLUGGED, SMALL, 3), Cell(PLUGGED, BRIDGE, 3))
OWN = "own"
PROCRUSTES, SAME = WIDTHS[0], WIDTHS[-1]


def ways(cell: Cell, layers: int) -> Iterator[tuple[str, Way]]:
    """By name: all maps with the route's own projection, and all projections with some maps.

    Args:
        cell: whose adapter it is; ``own`` takes each layer back to where it is from.
        layers: of the large model.
    """
    bridge = cell.route == BRIDGE
    own = {large: small for small, large in enumerate(evenly(cell.layers, layers))}
    maps: dict[str, str | Mapping[int, int] | None] = {OWN: None if bridge else own}
    maps |= {name: name for name in MAPS}
    for name, policy in maps.items():
        for width in WIDTHS:
            if width == (SAME if bridge else PROCRUSTES) or name in (OWN, MAPS[0]):
                yield f"{name}, {width}", Way(policy, width)


def make(searches: Searches, console: Console) -> None:
    """All that are not there."""
    for cell in ADAPTERS:
        for name, way in ways(cell, searches.problem.base.config.num_hidden_layers):
            found = one(searches, cell, name, way)
            dev, test = found["scales"]["1"]["dev"], found["scales"]["1"]["test"]
            console.print(
                f"{searches.name}, {searches.task}: {cell.name}, {name}: development loss "
                f"{dev['loss']:.3f}, test {test['loss']:.3f}, {100 * test['accuracy']:.1f} %",
                highlight=False,
                soft_wrap=True,
            )


def one(searches: Searches, cell: Cell, name: str, way: Way) -> Result:
    """Scores at all scales of a way, made or read."""
    settings: dict[str, Any] = {"cell": asdict(cell), "way": name, "lr": searches.rate(cell)}
    file = _folder(searches, cell) / f"{name.replace(', ', '-')}.json"
    found = searches.kept(file, settings)
    if found is None:
        plugged, _ = searches.plugged(cell, SEARCHED, way)
        found = {
            **{"settings": settings, "report": methods.told(plugged.report)},
            "scales": methods.scales(searches.problem, plugged.model, SCALES),
        }
        searches.keep(file, found)
    return found


def read(searches: Searches) -> dict[Cell, dict[str, Result]]:
    """Those that are there, by way."""
    found: dict[Cell, dict[str, Result]] = {}
    for cell in ADAPTERS:
        for file in sorted(_folder(searches, cell).glob("*.json")):
            result = json.loads(file.read_text(encoding="utf-8"))
            found.setdefault(cell, {})[result["settings"]["way"]] = result
    return found


def _folder(searches: Searches, cell: Cell) -> Path:
    return searches.folder / "variants" / cell.folder
