"""Losses from elsewhere: a step in which no closure is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zofo_kernels import Shift

from .capture import check_capture
from .checks import check_step_options
from .estimate import Estimate
from .estimators import ESTIMATORS, Point
from .evaluation import losses_of_examples
from .groups_and_state import GroupsAndState
from .listeners import Estimated
from .modes import undisturbed
from .perturbation import Perturbation
from .plain import make_plain, plain
from .replicas import Share
from .zo_groups import ZOGroup


class Displaced(NamedTuple):
    """Where one example of a population is evaluated: at w + scale v, v a direction of its own."""

    direction: int
    """Its number in the step."""
    side: int
    """1: forth along the direction; -1: back."""
    shifts: tuple[Shift, ...]
    """v and scale, which is mu or -mu, of each zeroth-order group."""


class AskTell(GroupsAndState):
    """The part of :class:`zofo_optim.HybridZOFO` that makes an estimate of losses.

    They are those of a closure, or of whoever was asked for them.
    """

    _asked: list[Displaced] | None = None  # since the last tell

    def ask(self, examples: int) -> list[Displaced]:
        """Where to evaluate the examples of a population, by whatever evaluates them.

        Of several processes, each asks for its part of it, and tells the scores of that.

        For scores that no closure can give: from a serving engine, a simulator, a person. Ask,
        evaluate each example at its place, :meth:`tell`, ``step()``. Directions must be
        ``"per_example"``, the estimator ``"antithetic"``. The weights here stay as they are.

        Args:
            examples: their number B, a multiple of 2 ``examples_per_direction``: so many in a row
                are displaced forth along a direction, then as many back.

        Returns:
            One a row of the population, in order. Asking again before telling gives the same.

        Raises:
            ValueError: ``examples``, the directions or the estimator are not as above.
            RuntimeError: called from inside a closure.

        Example:
            >>> optimizer = HybridZOFO(
            ...     hybrid_param_groups(model, dict(lr=1e-2), directions="per_example"),
            ...     structure="low_rank", perturbation="streamed",
            ...     directions="per_example", estimator="antithetic")
            >>> [(at.direction, at.side) for at in optimizer.ask(4)]
            [(0, 1), (0, -1), (1, 1), (1, -1)]
            >>> optimizer.tell([0.3, 0.1, 0.2, 0.2])
            >>> optimizer.step()
        """
        settings, examples = self._settings, plain(examples)
        if settings.sides == 1:
            raise ValueError(
                "estimator must be 'antithetic' to ask where examples are to be evaluated, got "
                f"{settings.estimator!r}"
            )
        multiple = settings.examples_of_a_direction
        sound = isinstance(examples, int) and not isinstance(examples, bool) and examples > 0
        if not sound or examples % multiple:
            raise ValueError(
                f"examples must be an int > 0 and a multiple of {multiple} where estimator="
                f"{settings.estimator!r} and examples_per_direction="
                f"{settings.examples_per_direction}, got {examples!r}"
            )
        groups = self._at_rest().groups
        if not groups:
            raise ValueError("ask needs a group with mode='zo', got first-order groups only")
        self._asked = self._places(examples, groups)
        return list(self._asked)

    def _places(self, examples: int, groups: Sequence[ZOGroup]) -> list[Displaced]:
        first, settings = self._directions, self._settings
        count = examples // settings.examples_of_a_direction
        numbers = [first + self.replicas.direction(place, count) for place in range(count)]
        return [
            Displaced(
                direction,
                side,
                tuple(
                    Shift(group.direction(direction), side * group.displacement) for group in groups
                ),
            )
            for direction in numbers
            for side in (1, -1)
            for _ in range(settings.examples_per_direction)
        ]

    def tell(self, scores: Any) -> None:
        """What was found where :meth:`ask` said; as ``backward`` leaves an estimate.

        First-order groups have in ``.grad`` what was left there.

        Args:
            scores: losses of the examples, or with ``maximize=True`` scores; shape (B,), a tensor,
                an array or a list of numbers, in the order in which they were asked for. Pairs
                with a score that is not finite count nothing.

        Raises:
            RuntimeError: nothing was asked for, or not of the present step.
            TypeError, ValueError: they are no real numbers, or of another number than was asked
                for.
            FloatingPointError: ``nonfinite="raise"`` and a score is not finite.
        """
        if self._asked is None:
            raise RuntimeError("call ask(examples) first: scores belong to the places it gives")
        losses = losses_of_examples(scores, "scores must be").detach()
        if losses.numel() != len(self._asked):
            raise ValueError(
                f"scores must be as many as were asked for, {len(self._asked)}, got "
                f"{losses.numel()}"
            )
        losses = losses.to(torch.promote_types(losses.dtype, torch.float32), copy=True)
        with undisturbed():
            groups = self._at_rest().groups
            if self._asked != self._places(len(self._asked), groups):
                raise RuntimeError(
                    "scores must be told before the optimizer goes on: it has made a step, taken "
                    "another estimate or loaded a state since ask()"
                )
            self._check_agreement()
            points = ESTIMATORS[self._settings.estimator].points(1, first_order=False)
            self._take(points, losses.unsqueeze(0), groups)
        self._asked = None

    def _check_agreement(self, **others: Any) -> None:
        """That the processes train alike, before they evaluate; ``others`` is compared too."""
        self._agreement.check(self.replicas, self.param_groups, self.zo_groups(), others)

    def _at_rest(self) -> Perturbation:
        """The perturbation over the present groups, which no step is displacing yet."""
        if self.evaluating:
            raise RuntimeError("a closure must not step the optimizer that is evaluating it")
        groups = self.zo_groups()
        if not any(group.params for group in groups):  # all became first-order
            groups = []
        for group in groups:  # now: later, some groups would have moved
            check_step_options(make_plain(group.options))
        check_capture(self._settings.capturable, groups, self._counters)
        self._perturbation.replicas = self.replicas
        self._evaluator.replicas = self.replicas
        return self._perturbation.over(self._perturbation.active(groups))

    def _take(
        self,
        points: Sequence[Point],
        losses: Tensor,
        groups: Sequence[ZOGroup],
        share: Share | None = None,
    ) -> Estimated:
        """Add what the losses of all processes say to the estimate of the step."""
        settings = self._settings
        points, losses, differences = self.replicas.gather(points, losses, share)
        estimate, estimated = Estimate.of(
            losses,
            differences,
            groups,
            has_clean=points[0].sign == 0,
            nonfinite=settings.nonfinite,
        )
        accumulated = estimate if self._estimate is None else self._estimate + estimate
        before, per_example = self._estimate is not None, estimate.per_example
        self._monitor.add(estimated.loss, estimated.slopes, before, per_example)
        self._listeners.estimated(estimated)
        self._monitor.warn(lambda: [name for group in groups for name in group.names])
        self._estimate = accumulated
        return estimated
