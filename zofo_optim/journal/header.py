"""What a journal's header says of an optimizer, and whether the two belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zofo_kernels.dispatch import backend_name

from ..names import difference
from ..optimizer import HybridZOFO
from ..quantized import Names
from ..settings import BEFORE
from ..zo_groups import ZOGroup
from .errors import JournalError
from .format import FORMAT_VERSION
from .reader import Recording

_MUST_MATCH = ("distribution", "structure", "rank", "active", "rounding", "perturbation")


def check_recordable(optimizer: HybridZOFO) -> None:
    """Raise TypeError, ValueError or RuntimeError where a journal cannot be attached now."""
    if not isinstance(optimizer, HybridZOFO):
        raise TypeError(f"optimizer must be a HybridZOFO, got {type(optimizer).__name__}")
    groups = optimizer.zo_groups()
    if not groups:
        raise ValueError("optimizer must have a group with mode='zo', got first-order groups only")
    if optimizer.settings.capturable:
        raise ValueError(
            "optimizer must not be capturable, as replays of a CUDA graph cannot be recorded"
        )
    if optimizer.evaluating:
        raise RuntimeError("a journal must not be attached inside a closure")
    if optimizer.accumulated is not None and len(optimizer.accumulated) != len(groups):
        raise RuntimeError(
            "optimizer must not be accumulating for other groups; call step() or zero_grad() first"
        )


def header_of(
    optimizer: HybridZOFO, model: nn.Module | None, metadata: dict[str, Any]
) -> dict[str, Any]:
    """Settings and parameters; without fingerprints."""
    settings = optimizer.settings
    path = settings.of_the_path()
    groups = optimizer.zo_groups()
    together = settings.examples_of_a_direction
    devices = {p.device for group in groups for p in group.params}
    backends = {backend_name(device, settings.backend) for device in devices}
    known = None if model is None else Names(model)
    names = [_names(group, known) for group in groups]
    counts = Counter(name for of_group in names for name in of_group)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise ValueError(f"param_names must be different for all parameters, got twice: {twice}")
    return {
        "format": FORMAT_VERSION,
        "noise_version": settings.noise_version,
        "distribution": settings.distribution,
        **(
            {}
            if settings.structure == BEFORE["structure"]
            else {"structure": settings.structure, "rank": settings.rank}
        ),
        **({} if settings.directions == "shared" else {"directions": settings.directions}),
        **({} if together == 1 else {"examples_of_a_direction": together}),
        **({} if path["active"] == BEFORE["active"] else {"active": path["active"]}),
        "rounding": settings.rounding,
        "perturbation": settings.perturbation,
        "estimator": settings.estimator,
        "num_samples": settings.num_samples,
        # coefficients are recorded as the rule left them, so replays need none of it
        **({} if path["zo_rule"] == "sgd" else {"zo_rule": path["zo_rule"]}),
        "backends": sorted(backends),
        "metadata": metadata,
        # made in the present step before the journal's start; replays leave them out
        **({"moves": len(optimizer.moves)} if optimizer.moves else {}),
        "groups": [
            {
                "names": of_group,
                "shapes": [list(p.shape) for p in group.params],
                "dtypes": [str(p.dtype).removeprefix("torch.") for p in group.params],
                "indices": group.indices,
                "float64": any(p.dtype == torch.float64 for p in group.params),
                "seed": group.options["seed"],
                "step": group.options["zo_step"],
            }
            for group, of_group in zip(groups, names, strict=True)
        ],
    }


def _names(group: ZOGroup, known: Names | None) -> list[str]:
    """By ``known``, a model's names, where there is one."""
    if known is not None:
        found = [known.of(p) for p in group.params]
        missing = [name for name, there in zip(group.names, found, strict=True) if there is None]
        if missing:
            raise ValueError(f"model must hold all zeroth-order parameters, not so: {missing}")
        return [name for name in found if name is not None]
    if "param_names" in group.options:
        return group.names
    return [str(index) for index in group.indices]


def check_same(recording: Recording, header: dict[str, Any]) -> None:
    """Raise JournalError where the journal is not of the optimizer that ``header`` is of."""
    ours, theirs = {**BEFORE, **header}, {**BEFORE, **recording.header}
    dtypes = {dtype for group in ours["groups"] for dtype in group["dtypes"]}
    rounds = not dtypes.isdisjoint(("bfloat16", "float16"))
    for key in ("noise_version", *_MUST_MATCH) if rounds else _MUST_MATCH:
        if ours[key] != theirs[key]:
            raise JournalError(
                f"{recording.path} was made with {key}={theirs[key]!r}, the optimizer has "
                f"{ours[key]!r}; construct it by HybridZOFO(..., {key}={theirs[key]!r}) to go on"
            )
    if len(ours["groups"]) != len(theirs["groups"]):
        raise JournalError(
            f"{recording.path} is of {len(theirs['groups'])} zeroth-order groups, the optimizer "
            f"has {len(ours['groups'])}"
        )
    for position, (mine, other) in enumerate(zip(ours["groups"], theirs["groups"], strict=True)):
        found = difference(mine["names"], other["names"])
        if found is not None:
            raise JournalError(
                f"zeroth-order group {position} must have the names of {recording.path} in the "
                f"same order, as the noise of a parameter goes by its place, but the journal has "
                f"{found}"
            )
        for key, what in (("shapes", "shape"), ("dtypes", "dtype"), ("indices", "noise index")):
            for name, here, there in zip(mine["names"], mine[key], other[key], strict=True):
                if here != there:
                    raise JournalError(
                        f"parameter {name!r} must have the {what} of {recording.path}, "
                        f"{there}, got {here}"
                    )


class Kinds:
    """The shapes and dtypes with which a journal's parameters began; a record is of no others."""

    def __init__(self, header: dict[str, Any]) -> None:
        groups = header["groups"]
        self._counts = [len(group["names"]) for group in groups]
        self._names = [name for group in groups for name in group["names"]]
        self._wanted = [
            (torch.Size(shape), getattr(torch, dtype))
            for group in groups
            for shape, dtype in zip(group["shapes"], group["dtypes"], strict=True)
        ]

    def active(self, group: int, positions: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Which parameters of a group moved, as records say it: None for all."""
        everything = positions is None or len(positions) == self._counts[group]
        return None if everything else positions

    def change(self, groups: Sequence[ZOGroup]) -> str | None:
        """What has changed since, for a message; called in every step, so it must be quick."""
        found = [(p.shape, p.dtype) for group in groups for p in group.params]
        if found == self._wanted:
            return None
        for name, wanted, got in zip(self._names, self._wanted, found, strict=False):
            if wanted != got:
                return (
                    f"parameter {name!r} had shape {tuple(wanted[0])} and dtype {wanted[1]}, and "
                    f"has shape {tuple(got[0])} and dtype {got[1]} now"
                )
        return f"there were {len(self._wanted)} zeroth-order parameters, and are {len(found)} now"
