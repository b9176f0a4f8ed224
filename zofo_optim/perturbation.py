"""Moving the zeroth-order parameters along random directions, and back, whatever happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor

from zofo_kernels import Direction, Shift, Weights, perturb_, uninterrupted, update_


@dataclass
class ZOGroup:
    """A zeroth-order parameter group, ready for one step.

    ``weights`` are its parameters, with their places among all zeroth-order parameters, which
    select their noise; ``options`` is the optimizer's own dictionary.
    """

    weights: Weights
    options: dict[str, Any]

    @property
    def params(self) -> list[Tensor]:
        return self.weights.tensors

    @property
    def indices(self) -> list[int]:
        return self.weights.indices

    @property
    def names(self) -> list[str]:
        """Names for messages, one a parameter; numbered where the user gave none."""
        given = self.options.get("param_names")
        if given is None:
            return [
                f"parameter {i} {tuple(p.shape)}"
                for i, p in zip(self.indices, self.params, strict=True)
            ]
        named = {id(p): name for p, name in zip(self.options["params"], given, strict=True)}
        return [named[id(p)] for p in self.params]

    @property
    def mu(self) -> float:
        return float(self.options["mu"])

    def direction(self, sample: int, distribution: str) -> Direction:
        options = self.options
        return Direction(options["seed"], options["zo_step"], sample, distribution)


class InPlacePerturbation:
    """Perturbs all groups together; leaving the ``with`` block restores what is displaced.

    One pass a move: weights go from one displaced point to the next by recovering first
    (w + mu z -> w -> w - mu z), which keeps 16-bit weights near where they were.
    """

    def __init__(self, groups: Sequence[ZOGroup], distribution: str, backend: str) -> None:
        self.groups = list(groups)
        self._distribution = distribution
        self._backend = backend
        self._carried: list[Shift | None] = [None] * len(groups)

    def __enter__(self) -> InPlacePerturbation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()

    def move(self, sample: int, sign: int) -> None:
        """Every group to w + sign mu z of direction ``sample``."""
        for position, group in enumerate(self.groups):
            shift = Shift(group.direction(sample, self._distribution), sign * group.mu)
            self._pass(position, shift)

    def restore(self) -> None:
        """Every group back to w."""
        with uninterrupted():  # all groups, before a Ctrl-C is raised
            for position, carried in enumerate(self._carried):
                if carried is not None:
                    self._pass(position, None)

    def _pass(self, position: int, shift: Shift | None) -> None:
        group = self.groups[position]
        direction, scale = shift if shift is not None else (None, 0.0)
        with uninterrupted():
            perturb_(
                group.weights,
                direction,
                scale,
                recover=self._carried[position],
                backend=self._backend,
            )
            self._carried[position] = shift

    def update(
        self,
        position: int,
        coefficients: Tensor,
        lr: float | Tensor,
        rounding: str,
    ) -> None:
        """Take group ``position`` from wherever it is to its updated weights, in one pass."""
        group = self.groups[position]
        samples = range(coefficients.numel())
        with uninterrupted():
            update_(
                group.weights,
                [group.direction(s, self._distribution) for s in samples],
                -coefficients if group.options["maximize"] else coefficients,
                lr,
                weight_decay=group.options["weight_decay"],
                recover=self._carried[position],
                rounding=rounding,
                backend=self._backend,
            )
            self._carried[position] = None
