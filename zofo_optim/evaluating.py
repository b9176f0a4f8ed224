"""Evaluations of one estimate: the closure at all points of this process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zofo_kernels._torch_compat import uncompiled

from .ask_tell import AskTell
from .capture import capturing
from .estimators import ESTIMATORS, Point
from .evaluation import Closure, Evaluation
from .modes import undisturbed
from .perturbation import Perturbation
from .plain import plain
from .replicas import Share
from .zo_groups import ZOGroup


class Evaluating(AskTell):
    """The part of :class:`zofo_optim.HybridZOFO` that visits points with a closure."""

    @uncompiled
    def verify(self, closure: Closure) -> None:
        """Make the first step's checks now, by a closure that is cheaper than the steps' own.

        They evaluate it for every few weights, which takes long where it generates texts. Let it
        use the model as the steps' closure does, and return a number that any displacement changes,
        such as a logit: scores of texts may not tell.

        Raises:
            TypeError, ValueError: the closure's result is no real scalar.
            RuntimeError: it does not use the weights as the perturbation takes it to.
        """
        with undisturbed(), self._at_rest() as perturbation:
            if perturbation.groups:
                self._check_agreement()
            self._evaluated(closure, perturbation, [])

    def _share(self, weight: Any, groups: Sequence[ZOGroup]) -> Share | None:
        """Of this process's loss among those of all; None where all count alike.

        Raises:
            TypeError, ValueError: ``weight`` is no finite number >= 0, here or in another process.
        """
        if groups and not capturing():
            self._check_agreement(given=weight is not None)
        if weight is None:
            return None
        weight = plain(weight)
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        sound = number and 0 <= weight < math.inf
        try:
            share = self.replicas.share(float(weight) if sound else math.nan)
        finally:  # others learn of it too
            if not number:
                raise TypeError(f"weight must be a number or None, got {weight!r}")
            if not sound:
                raise ValueError(f"weight must be a finite number >= 0, got {weight!r}")
        return share

    def _evaluated(
        self,
        closure: Closure,
        perturbation: Perturbation,
        first_order: Sequence[Tensor],
        share: Share | None = None,
    ) -> tuple[list[Point], list[Evaluation]]:
        """The points of an estimate, and what the closure gives at those of this process."""
        groups, settings = perturbation.groups, self._settings
        samples = settings.num_samples if groups else 0
        points = ESTIMATORS[settings.estimator].points(
            samples, first_order=bool(first_order), coupling=settings.coupling
        )
        zeroth_order = [p for g in self.param_groups if g["mode"] == "zo" for p in g["params"]]
        updates = self._in_backward if first_order else None
        trial = updates is not None and not updates.is_tried(first_order)
        devices = {p.device for p in [*first_order, *zeroth_order]} if groups or trial else None
        evaluations: list[Evaluation] = []
        runs = self._evaluator.runs(closure, first_order, devices, zeroth_order, updates, share)
        with runs as evaluate:
            mine = list(self.replicas.mine(points))
            if updates:  # the clean one last: others must see y as it was
                self._fo.follow(self.param_groups, self.state)
                mine = [*mine[:1] * trial, *mine[1:], mine[0]]
            found = perturbation.visit(mine, evaluate, first_direction=self._directions)
            evaluations = [found[-1], *found[trial:-1]] if updates else found
        if groups and not evaluations and self.replicas.size > 1:
            raise TypeError(
                "closure must return a loss in every process, got None: others wait for it; skip "
                "batches in all of them, or give weight=0 where one has none"
            )
        return points, evaluations
