"""What every perturbation does: visit points with a closure, restore, apply updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from zofo_kernels import Shift, Weights, uninterrupted, update_
from zofo_kernels._torch_compat import unwritten_by_parametrizing

from ..advice import Advice
from ..capture import capturing
from ..estimators import Point
from ..evaluation import Evaluation
from ..gathered import GatheredWeights
from ..listeners import Listener
from ..moves import Moves
from ..offload.device_visits import settle
from ..offload.in_turn import in_pieces
from ..quantized import LearningScales, check_held
from ..replicas import OneProcess, Replicas
from ..settings import Settings
from ..update import Update
from ..watch import Answer
from ..zo_groups import Noise, Tables, ZOGroup, is_same

Evaluate = Callable[[float], Evaluation]
"""Runs the closure once: with gradients of this weight, or without where it is 0."""
Run = Callable[["float", "Answer | None"], Evaluation]
"""The same, with who answers its torch calls."""


class Perturbation(ABC):
    """Evaluations at x + sign mu v for all groups together, and the update. One an optimizer.

    A step is ``with perturbation.over(groups): visit, update``; leaving the block restores
    what is displaced, whatever happened in it.

    Args:
        settings: the optimizer's.
        listener: told of each move before it is made.
        advice: says once what is wrong with a closure.
    """

    def __init__(self, settings: Settings, listener: Listener, advice: Advice) -> None:
        self.groups: list[ZOGroup] = []
        """The ZO groups of the present step."""
        self.moves = Moves()
        """Since the last update; moves round, so weights depend on them."""
        self.model: nn.Module | None = None
        """That the parameters are of; None: unknown."""
        self.scales = LearningScales()
        """What learns of quantised weights; a module may come to use another tensor."""
        self.gathered = GatheredWeights()
        """What FSDP2 has gathered of the weights."""
        self._settings = settings
        self._listener = listener
        self._advice = advice
        self._tables = Tables(
            Noise(settings.distribution, settings.noise_version, settings.direction_rank)
        )
        self._carried: dict[int, Shift] = {}  # by the group's position, within a step
        self._weights: list[Weights] = []  # what the verification is of
        self._verified: dict[int, tuple[Tensor, bool]] = {}  # by id: and whether wholly
        self._first_direction = 0
        self._examples: int | None = None  # of this batch, once known
        self.replicas: Replicas = OneProcess(settings)
        """The processes that evaluate along with this one."""

    def groups_of(self, param_groups: Iterable[dict[str, Any]]) -> list[ZOGroup]:
        """The zeroth-order ones, with their tables of addresses kept from step to step."""
        return self._tables.groups(param_groups)

    def active(self, groups: Sequence[ZOGroup]) -> list[ZOGroup]:
        """The groups as the present step moves them."""
        return self._tables.active(groups, self._settings.activity)

    def over(self, groups: list[ZOGroup]) -> Perturbation:
        """Work on these groups from now on.

        Raises:
            RuntimeError: the model has replaced quantisation scales that learn.
        """
        check_held(self.scales, (p for group in groups for p in group.params))
        self.groups = groups
        weights = [group.weights for group in groups]
        if not is_same(weights, self._weights):
            self._weights = []  # in case of an error
            self.gathered.begin(self.model, named(groups))
            self._renew()
            self._weights = weights
        return self

    def _renew(self) -> None:  # noqa: B027  # not every perturbation keeps something of them
        """The groups have other parameters than in the step before."""

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()

    def visit(
        self, points: Sequence[Point], evaluate: Run, *, first_direction: int = 0
    ) -> list[Evaluation]:
        """Evaluate at each point in turn. The weights then stay at the last one.

        Args:
            points: in order.
            evaluate: runs the closure.
            first_direction: where examples have directions of their own, the number of the
                batch's first one in the step.
        """
        found: list[Evaluation] = []
        self._first_direction = first_direction
        self._examples = None
        self.gathered.begin_step()
        run = self._guarded(lambda gradient: self._run(evaluate, gradient))
        for point in points:
            if point.sign:
                self.move(point.sample, point.sign)
            else:
                self.restore()
            evaluation = self._evaluate_here(point, run)
            if point.sign and found:  # no graph that it may hold is needed
                evaluation = evaluation._replace(returned=None)
            found.append(evaluation)
        return found

    def _evaluate_here(self, point: Point, run: Evaluate) -> Evaluation:
        evaluation = run(point.gradient)
        if point.sign and not capturing() and not self._all_verified(evaluation.loss):
            self._verify_once(lambda: run(0.0).loss, evaluation.loss, bool(point.gradient))
        return evaluation

    def _run(self, evaluate: Run, gradient: float) -> Evaluation:
        """One evaluation where the weights are now."""
        return evaluate(gradient, None)

    def _guarded(self, evaluate: Evaluate) -> Evaluate:
        """``evaluate``; raises where the closure writes to a weight, which no move takes back."""

        def guarded(gradient: float) -> Evaluation:
            watched = [
                (group, place, p, p._version)
                for group in self.groups
                for place, p in enumerate(group.placed.locals)
                if not p.is_inference()  # these count no versions
            ]
            try:
                with self.gathered.fresh(lambda: named(self.groups)), unwritten_by_parametrizing():
                    evaluation = evaluate(gradient)
            finally:
                settle()
                for group in self.groups:
                    group.placed.refresh()
            changed = [(g, place) for g, place, p, version in watched if p._version != version]
            if changed:
                names = [group.names[place] for group, place in changed]
                raise RuntimeError(
                    f"closure must not write to the zeroth-order parameter {names[0]!r}"
                    + f" ({len(names)} in all: {', '.join(names)})" * (len(names) > 1)
                    + ": the weights are perturbed while it runs, and what it writes would stay. "
                    "Leave out what writes it, such as max_norm of an embedding or merging an "
                    "adapter, or exclude the parameter from the zeroth-order groups"
                )
            return evaluation

        return guarded

    # ---- verification, once for every parameter -----------------------------------------------

    def agree(self, flag: bool) -> bool:
        """Whether it is set in all processes, which then go on, or raise, together."""
        return self.replicas.agree(flag)

    def _all_verified(self, loss: Tensor) -> bool:
        params = [p for group in self.groups for p in group.params]
        if not all(id(p) in self._verified for p in params):
            return False
        if all(self._verified[id(p)][1] for p in params):
            return True
        return self.agree(not self._tells_all(loss))

    def _tells_all(self, loss: Tensor) -> bool:
        """Whether no verification could tell more than one at such a loss."""
        return True

    def _verify_once(
        self, evaluate: Callable[[], Tensor], loss: Tensor, graph: bool = False
    ) -> None:
        """At the first displaced point with a finite loss; others tell nothing.

        Args:
            evaluate: evaluates the loss at the present point.
            loss: the loss there.
            graph: whether it was found with gradients, by another arithmetic perhaps.
        """
        if not self.agree(self._tells(loss)):
            return
        if graph:
            loss = evaluate()
        again = self.verify(evaluate, loss)
        if again is not None and not same(again, loss):
            self._advice.once("repeat", self._of_two_losses(loss, again))
        wholly = not self.agree(not self._tells_all(loss))  # in one process is enough
        self._verified |= {id(p): (p, wholly) for group in self.groups for p in group.params}

    def _tells(self, loss: Tensor) -> bool:
        """Whether anything can be verified at it."""
        return bool(loss.isfinite().all())

    def verify(self, evaluate: Callable[[], Tensor], loss: Tensor) -> Tensor | None:
        """Evaluate once more at the present point, and compare.

        Args:
            evaluate: evaluates the loss at the present point.
            loss: the loss there.

        Returns:
            The loss found now, where it is another one in some process; None where it is the same
            to the bit.
        """
        again = evaluate()
        return None if self.agree(same(again, loss)) else again

    def _of_two_losses(self, loss: Tensor, again: Tensor) -> str:
        """What is said of a closure that gave another loss at the same point."""
        return (
            f"closure gave two losses at the same point, {shown(loss)} and {shown(again)}: "
            "their difference, divided by mu, is an error of the zeroth-order estimate. It must "
            "use the same batch whenever it is called in a step, draw from the global generators "
            "only, and change nothing that its loss depends on"
        )

    # ---- moves and the update -----------------------------------------------------------------

    @abstractmethod
    def move(self, sample: int, sign: int) -> None:
        """Every group to w + sign mu v of direction ``sample``."""

    @abstractmethod
    def restore(self) -> None:
        """Every group back to w; where they are, nothing happens."""

    def update(self, updates: Sequence[Update]) -> None:
        """Take each group from wherever it is to its updated weights, one pass a group."""
        with uninterrupted():
            settle()
            self.gathered.reshard()
            for position, update in enumerate(updates):
                update_(
                    in_pieces(self.groups[position].weights),
                    update.directions,
                    update.coefficients,
                    update.lr,
                    weight_decay=update.weight_decay,
                    recover=self._carried.get(position),
                    rounding=self._settings.rounding,
                    backend=self._settings.backend,
                )
                self._carried.pop(position, None)
            self.gathered.updated()
            self.moves.clear()

    def _shift(self, group: ZOGroup, sample: int, sign: int) -> Shift:
        return Shift(group.direction(sample), sign * group.displacement)


def named(groups: Sequence[ZOGroup]) -> list[tuple[str, Tensor]]:
    """All parameters, each with its name."""
    return [(n, p) for g in groups for n, p in zip(g.names, g.params, strict=True)]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether losses are equal to the bit, or both NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def shown(loss: Tensor) -> str:
    """For messages."""
    return f"{loss.mean().item():.8g}" + " on average" * (loss.dim() > 0)


def written(tensor: Tensor) -> tuple[int, int]:
    """Changes when someone writes to the tensor; those of inference mode count no versions."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
