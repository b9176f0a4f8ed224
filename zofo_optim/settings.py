"""Settings that belong to the optimizer as a whole, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from zofo_kernels import (
    BACKENDS,
    DISTRIBUTIONS,
    LARGEST_RANK,
    NOISE_VERSIONS,
    ROUNDINGS,
    STRUCTURES,
    unavailable_reason,
)

from .active import Active, active_of
from .estimators import ESTIMATORS
from .rules import Rule, check_repr, described, rule_of

PERTURBATIONS = ("in_place", "streamed")
DIRECTIONS = ("shared", "per_example")
PARALLEL = ("data", "samples")
EXAMPLE_ORDERS = ("interleaved", "contiguous")
NONFINITE = ("skip", "raise")
_OF_EXAMPLES = {"structure": "low_rank", "perturbation": "streamed", "num_samples": 1}
_OF_PROCESSES = ("parallel", "example_order", "check_ranks_every")
_NOT_OF_THE_PATH = ("nonfinite", "backend", "capturable", *_OF_PROCESSES)
_IN_BACKWARD = {"nonfinite": "raise", "coupling": 0, "capturable": False}
"""What looks at no gradient before it is applied."""


BEFORE = {
    "noise_version": 1,
    "structure": "full",
    "rank": 1,
    "directions": "shared",
    "examples_per_direction": 1,
    "active": None,
    "coupling": 0.0,
    "optimizer_in_backward": False,
}
"""What earlier versions had no choice in, so that what they saved does not say it."""


def direction_rank(structure: str, rank: int) -> int:
    """What directions call their rank: 0 where they are full."""
    return rank if structure == "low_rank" else 0


def check_coupling(coupling: Any) -> None:
    """Raise ValueError where it is no finite number >= 0; a bool is one."""
    if not isinstance(coupling, (int, float)) or not 0 <= coupling < math.inf:
        raise ValueError(f"coupling must be a finite number >= 0, got {coupling!r}")


@dataclass(frozen=True)
class Settings:
    """See :class:`zofo_optim.HybridZOFO` for the meaning of each field, and for what is raised."""

    estimator: str
    num_samples: int
    distribution: str
    perturbation: str
    rounding: str
    zo_rule: str | Rule
    nonfinite: str
    backend: str
    capturable: bool
    noise_version: int
    structure: str = "full"
    rank: int = 1
    directions: str = "shared"
    examples_per_direction: int = 1
    active: Any = None
    coupling: float = 0.0
    optimizer_in_backward: bool = False
    parallel: str = "data"
    example_order: str = "interleaved"
    check_ranks_every: int = 100

    def __post_init__(self) -> None:
        choices = {
            "estimator": tuple(ESTIMATORS),
            "distribution": tuple(DISTRIBUTIONS),
            "structure": tuple(STRUCTURES),
            "directions": DIRECTIONS,
            "perturbation": PERTURBATIONS,
            "rounding": ROUNDINGS,
            "nonfinite": NONFINITE,
            "parallel": PARALLEL,
            "example_order": EXAMPLE_ORDERS,
            "backend": BACKENDS,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        version = self.noise_version
        if type(version) is not int or version not in NOISE_VERSIONS:
            raise ValueError(f"noise_version must be one of {NOISE_VERSIONS}, got {version!r}")
        for name in ("num_samples", "rank", "examples_per_direction"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        every = self.check_ranks_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise ValueError(f"check_ranks_every must be an int >= 0, got {every!r}")
        if self.parallel == "samples" and self.perturbation == "in_place":
            raise ValueError(
                "perturbation must be 'streamed' where parallel='samples', got 'in_place', which "
                "moves the weights: processes that move along different directions round "
                "differently, and drift apart"
            )
        if self.rank > LARGEST_RANK:
            raise ValueError(f"rank must be at most {LARGEST_RANK}, got {self.rank}")
        if self.structure == "full" and self.rank != 1:
            raise ValueError(
                f"rank must be left alone where structure='full', got {self.rank}; did you mean "
                "structure='low_rank'?"
            )
        if self.structure == "low_rank" and version == 1:
            raise ValueError(
                "noise_version must be 2 or later where structure='low_rank', got 1, which has "
                "full directions only"
            )
        if isinstance(self.coupling, bool):
            raise ValueError(f"coupling must be a finite number >= 0, got {self.coupling!r}")
        check_coupling(self.coupling)
        check_repr(self.rule)
        samples = self.num_samples
        if samples < self.rule.min_samples and self.directions == "shared":
            raise ValueError(
                f"num_samples must be >= {self.rule.min_samples} where zo_rule={self.zo_rule!r}, "
                f"which compares the samples of a step, got {samples}"
            )
        if self.backend != "auto":
            reason = unavailable_reason(self.backend)
            if reason is not None:
                raise RuntimeError(f"backend={self.backend!r} is not available: {reason}")
        if self.capturable and self.nonfinite == "raise":
            raise ValueError(
                "nonfinite must be 'skip' where capturable=True, as a captured step cannot raise"
            )

        if not isinstance(self.optimizer_in_backward, bool):
            raise TypeError(
                f"optimizer_in_backward must be a bool, got {self.optimizer_in_backward!r}"
            )
        for name, needed in _IN_BACKWARD.items() if self.optimizer_in_backward else ():
            if getattr(self, name) != needed:
                raise ValueError(
                    f"{name} must be {needed!r} where optimizer_in_backward=True, which applies "
                    f"gradients as they come, got {getattr(self, name)!r}"
                )
        if self.directions == "shared":
            if self.examples_per_direction != 1:
                raise ValueError(
                    "examples_per_direction must be left alone where directions='shared', got "
                    f"{self.examples_per_direction}; did you mean directions='per_example'?"
                )
            if self.sides > 1:
                raise ValueError(
                    f"directions must be 'per_example' where estimator={self.estimator!r}, which "
                    "displaces the examples of a batch in pairs, got 'shared'"
                )
        activity = self.activity
        if self.capturable and activity is not None and activity.changes:
            raise ValueError(
                f"active must be None or patterns where capturable=True, got {self.active!r}: what "
                "moves would be that of the captured step in all replays"
            )
        if self.directions == "per_example":
            for name, needed in _OF_EXAMPLES.items():
                if getattr(self, name) != needed:
                    raise ValueError(
                        f"{name} must be {needed!r} where directions='per_example', got "
                        f"{getattr(self, name)!r}"
                    )

    @property
    def direction_rank(self) -> int:
        """What directions call their rank."""
        return direction_rank(self.structure, self.rank)

    @property
    def sides(self) -> int:
        """Of a direction, in one evaluation."""
        return ESTIMATORS[self.estimator].sides

    @property
    def examples_of_a_direction(self) -> int:
        """All those along it, on both sides where an evaluation has two."""
        return self.examples_per_direction * self.sides

    @property
    def activity(self) -> Active | None:
        """What ``active`` says; None: all parameters move."""
        return active_of(self.active)

    @property
    def rule(self) -> Rule:
        """The one that ``zo_rule`` names, or is."""
        return rule_of(self.zo_rule)

    def of_the_path(self) -> dict[str, Any]:
        """Those by which the weights would come out differently, in plain values."""
        found = {k: v for k, v in vars(self).items() if k not in _NOT_OF_THE_PATH}
        activity = self.activity
        active = None if activity is None else activity.described()
        return {**found, "zo_rule": described(self.rule), "active": active}


SETTINGS = tuple(field.name for field in fields(Settings))
