"""Groups of scales by size, and how they come back as they were saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..names import match_names


def unit_of(scale: Tensor) -> float:
    """The size of a tensor's elements: their root mean square, as a power of two."""
    size = float(scale.detach().to(torch.float64).square().mean().sqrt()) if scale.numel() else 0.0
    return 2.0 ** round(math.log2(size)) if 0.0 < size < math.inf else 1.0


def as_saved(
    current: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]] | None:
    """The groups with zeroth-order tensors where saved ones have them; None: nothing is to be done.

    Scales that have learnt may be of another size than when they were put in groups: then groups
    that are made anew differ from those that were saved, and so would the directions.
    """
    first_order = [g for g in current if g["mode"] == "fo"]
    ours = [g for g in current if g["mode"] == "zo"]
    theirs = [g for g in saved if g.get("mode") == "zo"]
    if not any("unit" in g for g in theirs) or not all(
        "param_names" in g for g in [*ours, *theirs]
    ):
        return None
    names = [[str(name) for name in g["param_names"]] for g in theirs]
    tensors = {n: p for g in ours for n, p in zip(g["param_names"], g["params"], strict=True)}
    every = [name for group in names for name in group]
    where = match_names(every, tensors)
    arranged = [[where.get(name) for name in group] for group in names]
    before = [list(g["param_names"]) for g in ours]
    complete = len(every) == len(where) == len(tensors)
    same_others = len(first_order) == len(saved) - len(theirs)
    if not ours or arranged == before or not complete or not same_others:
        return None
    zeroth_order = iter(
        {**ours[0], **_options(theirs[k]), "params": [tensors[n] for n in group if n is not None]}
        | {"param_names": group}
        for k, group in enumerate(arranged)
    )
    rest = iter(dict(g) for g in first_order)
    return [next(zeroth_order if g.get("mode") == "zo" else rest) for g in saved]


def _options(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in saved.items() if name not in ("params", "param_names")}
