"""Checks of what a user passes, and where a warning about it should point."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

from torch import Tensor

from zofo_kernels import check_weight
from zofo_kernels.memory import first_shared, has_memory

from .settings import Settings
from .zo_groups import ZOGroup

MODES = ("zo", "fo")
INSIDE = ("zofo_optim", "torch")
"""Packages whose frames a warning skips."""


def caller_level() -> int:
    """``stacklevel`` of the nearest frame outside this package and torch, seen from its caller."""
    level = 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    return level


def check_mode(mode: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")


def check_seed(seed: Any) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")


def check_mu(mu: Any) -> None:
    if isinstance(mu, bool) or not isinstance(mu, (int, float)) or not 0.0 < mu < math.inf:
        raise ValueError(f"Invalid mu value: {mu!r} (must be a finite number > 0)")


def check_step_options(group: Mapping[str, Any]) -> None:
    """Options of a ZO group that a user may change between steps; waits for no device."""
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    elif not 0.0 <= lr < math.inf:
        raise ValueError(f"Invalid learning rate: {lr} (must be a finite number >= 0)")
    check_mu(group["mu"])
    if not isinstance(decay, (int, float)) or not 0.0 <= decay < math.inf:
        raise ValueError(f"Invalid weight_decay value: {decay!r} (must be finite and >= 0)")


def check_zo_options(
    group: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Options of a ZO group; ``given`` are those that the group itself set."""
    check_step_options(group)
    lr = group["lr"]
    if isinstance(lr, Tensor) and not 0.0 <= float(lr) < math.inf:
        raise ValueError(f"Invalid learning rate: {lr} (must be a finite number >= 0)")
    for option in ("momentum", "dampening", "nesterov"):
        if given.get(option) and given[option] != defaults.get(option):
            raise ValueError(
                f"{option} must not be set in a group with mode='zo', which keeps no state, "
                f"got {given[option]!r}"
            )
    check_seed(group["seed"])


def check_group(
    group: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """The options of a group that is being added; ``given`` are those that it set itself."""
    check_mode(group["mode"])
    for field in dataclasses.fields(Settings):
        if field.name in given and field.name != "capturable":
            raise ValueError(
                f"{field.name} must be given to HybridZOFO, for all groups, "
                f"got {given[field.name]!r} in a parameter group"
            )
    if group["mode"] == "zo":
        check_zo_options(group, given, defaults)


def check_zo_parameters(groups: Sequence[ZOGroup], first_order: Iterable[Tensor]) -> None:
    """Every ZO parameter can be perturbed, and none shares memory with a parameter of any mode."""
    parameters = [p for group in groups for p in group.params]
    names = [name for group in groups for name in group.names]
    for parameter, name in zip(parameters, names, strict=True):
        check_weight(parameter, f"zeroth-order parameter {name!r}")
    # of a wrapper, such as a DTensor, the memory is not known
    others = [p for p in first_order if has_memory(p)] if groups else []
    shared = first_shared(parameters, others)
    if shared is None:
        return
    first, second = shared
    if second < len(parameters):
        raise ValueError(
            f"zeroth-order parameters {names[first]!r} and {names[second]!r} share memory and "
            "would be perturbed twice; pass one of them"
        )
    other = others[second - len(parameters)]
    raise ValueError(
        f"zeroth-order parameter {names[first]!r} shares memory with a first-order parameter of "
        f"shape {tuple(other.shape)}, which would be moved under the first-order gradient; pass "
        "one of them, or make one a copy"
    )
