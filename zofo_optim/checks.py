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

from .active import Active
from .defaults import value_of
from .first_order import FirstOrder
from .offload.in_turn import is_offloaded
from .settings import Settings
from .sharding import local_of
from .zo_groups import ZOGroup

MODES = ("zo", "fo")
ZO_OPTIONS = ("lr", "mu", "unit", "weight_decay", "maximize", "seed")
NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
FLAGS = ("nesterov", "maximize", "capturable")
STATEFUL = ("momentum", "dampening", "nesterov")
OFF_BY_ZERO = (*STATEFUL, "weight_decay", "maximize", "capturable")
"""Options that a group may set to 0 though it lacks them, as it then does what they say."""
NOTES = (
    *("params", "param_names", "mode"),
    *("initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"),  # schedulers'
    *("name", "group_name", "lr_scale"),  # read by loggers and schedulers of other libraries
)
"""What any group may hold beside options."""
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


def check_unit(unit: Any) -> None:
    if isinstance(unit, bool) or not isinstance(unit, (int, float)) or not 0.0 < unit < math.inf:
        raise ValueError(f"Invalid unit value: {unit!r} (must be a finite number > 0)")


def check_zo_defaults(options: Mapping[str, Any]) -> None:
    """Of groups that set none; also without ZO groups, as one may be added later."""
    check_mode(options["mode"])
    check_seed(options["seed"])
    check_mu(options["mu"])


def check_kinds(options: Mapping[str, Any]) -> None:
    """Raise TypeError where an option that is a number or a flag is a string, such as "1e-3".

    Comparisons would raise without its name, and flags would be on for "False".
    """
    for name in (*NUMBERS, *FLAGS):
        value = value_of(options.get(name))
        if isinstance(value, (str, bytes)):
            kind = "a number" if name in NUMBERS else "True or False"
            raise TypeError(f"{name} must be {kind}, got the string {value!r}")


def rounds_to_zero(group: Mapping[str, Any]) -> bool:
    """Whether a rate below 0 is a rounding error, as schedules leave them that end at 0.

    Schedulers keep the rate that they began with as ``initial_lr``. Such a rate counts as 0.
    """
    initial = group.get("initial_lr", 1e-6)
    size = abs(initial) if isinstance(initial, (int, float)) else 1e-6
    return bool(-1e-6 * size <= group["lr"] < 0.0)


def check_step_options(group: Mapping[str, Any]) -> None:
    """Options of a ZO group that a user may change between steps; waits for no device."""
    check_kinds(group)
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    elif not isinstance(lr, (int, float)):
        raise TypeError(f"lr must be a finite number >= 0 or a one-element tensor, got {lr!r}")
    elif not (0.0 <= lr < math.inf or rounds_to_zero(group)):
        raise ValueError(f"Invalid learning rate: {lr} (lr must be a finite number >= 0)")
    check_mu(group["mu"])
    check_unit(group.get("unit", 1.0))
    if not isinstance(decay, (int, float)) or not 0.0 <= decay < math.inf:
        raise ValueError(f"Invalid weight_decay value: {decay!r} (must be finite and >= 0)")


def check_zo_options(group: Mapping[str, Any]) -> None:
    """Options of a ZO group that is being added; may wait for the device."""
    check_step_options(group)
    lr = group["lr"]
    if not 0.0 <= float(lr) < math.inf and "initial_lr" not in group:
        raise ValueError(f"Invalid learning rate: {lr} (lr must be a finite number >= 0)")
    check_seed(group["seed"])


def check_option_names(mode: Any, given: Mapping[str, Any], first_order: FirstOrder) -> None:
    """Options that a group sets itself: those that its mode has, and no others.

    Raises:
        TypeError: an option that groups of this mode do not have.
        ValueError: an option of the optimizer as a whole, momentum of a ZO group, or another mode.
    """
    check_mode(mode)
    if "zo_step" in given:  # a group that was in an optimizer, with all that it has there
        return
    known = ZO_OPTIONS if mode == "zo" else tuple(first_order.defaults)
    may_be_off = {*OFF_BY_ZERO, *first_order.defaults}  # as where torch's SGD had the group before
    settings = {field.name for field in dataclasses.fields(Settings)}
    for name, value in given.items():
        if name in known or name in NOTES:
            continue
        if name in settings and name != "capturable":
            raise ValueError(
                f"{name} must be given to HybridZOFO, for all groups, "
                f"got {value!r} in a parameter group"
            )
        if name in may_be_off and not isinstance(value, Tensor) and not value:
            continue
        if name in STATEFUL and mode == "zo":
            raise ValueError(
                f"{name} must not be set in a group with mode='zo', which keeps no state, "
                f"got {value!r}"
            )
        of = "" if mode == "zo" else f" and fo_optimizer={first_order.name}"
        raise TypeError(
            f"{name!r} is no option of a group with mode={mode!r}{of}, got {value!r}; there are "
            + ", ".join(known)
        )


def check_rate_is_given(group: Mapping[str, Any]) -> None:
    """For ZO groups, which no default serves: at 1e-3 a language model diverges."""
    if "lr" not in group:
        raise ValueError(
            "lr must be given for a group with mode='zo', in the group or to HybridZOFO; for "
            "language models start at 1e-6, and see the page on choosing settings"
        )


def check_group(
    group: Mapping[str, Any],
    given: Mapping[str, Any],
    first_order: FirstOrder,
    *,
    has_rate: bool,
) -> None:
    """The options of a group that is being added.

    Args:
        group: with its defaults.
        given: what it set itself.
        first_order: steps the FO groups.
        has_rate: whether the optimizer was given a learning rate for all groups.
    """
    check_option_names(group["mode"], given, first_order)
    check_kinds(group)
    if group["mode"] == "zo":
        check_zo_options(group)
        if not has_rate:
            check_rate_is_given(given)
    else:
        first_order.check(given)


def check_zo_parameters(groups: Sequence[ZOGroup], first_order: Iterable[Tensor]) -> None:
    """Every ZO parameter can be perturbed, and none shares memory with a parameter of any mode."""
    parameters = [p for group in groups for p in group.placed.locals]
    names = [name for group in groups for name in group.names]
    for parameter, name in zip(parameters, names, strict=True):
        check_weight(parameter, f"zeroth-order parameter {name!r}")
    # of other wrappers the memory is not known
    others = [p for p in map(local_of, first_order) if has_memory(p)] if groups else []
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


def check_offloaded(groups: Sequence[ZOGroup], settings: Settings) -> None:
    """
    Raises:
        ValueError: weights are offloaded, and each evaluation would write them there, or a graph
            of a GPU would have to.
    """
    for group in groups:
        for parameter, name in zip(group.placed.locals, group.names, strict=False):
            if not is_offloaded(parameter):
                continue
            if settings.perturbation == "in_place":
                raise ValueError(
                    f"perturbation must be 'streamed' where weights are offloaded, as {name!r} is, "
                    "got 'in_place', which writes all weights away in each evaluation"
                )
            if settings.capturable:
                raise ValueError(
                    f"capturable must be False where weights are offloaded, as {name!r} is, got "
                    "True: they are updated on the host"
                )
            return


def check_active(activity: Active | None, groups: Sequence[ZOGroup]) -> None:
    """What ``active`` says can be told of these groups' parameters, and fits them.

    Raises:
        ValueError: parameters have no names, or no name is matched.
    """
    if activity is None or not groups:
        return
    if activity.needs_names and not all("param_names" in group.options for group in groups):
        raise ValueError(
            f"active must be None or a fraction where parameters have no names, got {activity}; "
            "hybrid_param_groups names them, and so does a list of (name, parameter)"
        )
    activity.check([group.names for group in groups])
