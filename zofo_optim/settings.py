"""Settings that belong to the optimizer as a whole, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zofo_kernels import BACKENDS, DISTRIBUTIONS, ROUNDINGS, unavailable_reason

from .estimators import ESTIMATORS

PERTURBATIONS = ("in_place", "streamed")
NONFINITE = ("skip", "raise")


@dataclass(frozen=True)
class Settings:
    """See :class:`zofo_optim.HybridZOFO` for the meaning of each field."""

    estimator: str
    num_samples: int
    distribution: str
    perturbation: str
    rounding: str
    nonfinite: str
    backend: str

    def __post_init__(self) -> None:
        choices = {
            "estimator": tuple(ESTIMATORS),
            "distribution": DISTRIBUTIONS,
            "perturbation": PERTURBATIONS,
            "rounding": ROUNDINGS,
            "nonfinite": NONFINITE,
            "backend": BACKENDS,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        samples = self.num_samples
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise ValueError(f"num_samples must be an int >= 1, got {samples!r}")
        if self.backend != "auto":
            reason = unavailable_reason(self.backend)
            if reason is not None:
                raise RuntimeError(f"backend={self.backend!r} is not available: {reason}")

    def of_the_path(self) -> dict[str, Any]:
        """Those by which the weights would come out differently."""
        return {
            "estimator": self.estimator,
            "num_samples": self.num_samples,
            "distribution": self.distribution,
            "perturbation": self.perturbation,
            "rounding": self.rounding,
        }
