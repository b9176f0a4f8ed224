"""Perturbation without writing: torch functions get perturbed copies of the parameters.

While a loss is evaluated at w + scale v, a torch-function mode sees every torch call and replaces
each zeroth-order parameter among its arguments by a fresh, perturbed copy. A copy lives as long as
the call needs it; the weights themselves are written by updates only, so they cannot drift.

Compiled code makes no torch calls, so ``torch.compile`` is off while a closure is evaluated, also
at w itself: losses that are subtracted come from the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

from torch import Tensor

from zofo_kernels import Shift, matrix_of

from ..advice import Advice
from ..evaluation import Evaluation
from ..listeners import Listener
from ..saved_copies import SavedCopies
from ..settings import Settings
from ..update import Update
from ..zo_groups import ZOGroup
from .base import Perturbation, Run
from .closed_forms import ClosedForms, NoOwner
from .low_rank import Displacement, LowRank, Source
from .stand_ins import StandIns, check_alike
from .streaming import Streaming, uncompiled
from .verification import Verification
from .written import Written


class At(NamedTuple):
    """Where evaluations are, and how they get there."""

    sample: int = 0
    sign: int = 0
    factor: int = 1
    """Of mu."""
    shared: bool = True
    """All examples have the sample's direction; False: they have their own."""
    closed: Collection[int] | None = None
    """The matrices, by ``id``, that are not copied; None: all that can be."""
    alone: Collection[int] | None = None
    """Where examples have directions of their own, those displacements that are made; None: all."""


class StreamedPerturbation(Perturbation):
    """Evaluations see perturbed copies of the weights, which are written by updates only."""

    def __init__(self, settings: Settings, listener: Listener, advice: Advice) -> None:
        super().__init__(settings, listener, advice)
        self.stand_ins = StandIns()
        """What forward passes see of sharded parameters."""
        self.written = Written(settings.backend, self.gathered.reshard)
        """What the verification displaces."""
        self.forms: ClosedForms | None = None
        """Of the last evaluation."""
        self._at = At()
        self._shifts: list[Shift] = []
        self._sources: dict[int, Source] = {}
        self._low_rank: LowRank | None = None
        self._whole: Sequence[ZOGroup] = []  # the step's groups, with what does not move in it
        self._guess: int | None = None  # examples of a batch; None: as its first input says

    def active(self, groups: Sequence[ZOGroup]) -> list[ZOGroup]:
        self._whole = groups
        return super().active(groups)

    def over(self, groups: list[ZOGroup]) -> StreamedPerturbation:
        self.written.put_back()
        every = [p for group in self._whole for p in group.params]
        if self.stand_ins.find(every, self.model):
            self._whole = self.groups_of([group.options for group in self._whole])
            groups = super().active(self._whole)
        super().over(groups)
        if self._low_rank is not None and self._low_rank.is_outdated():
            self._low_rank = LowRank(self._sources.values(), self._settings.backend)
        return self

    def _renew(self) -> None:
        sources = [
            Source(self.stand_ins.of(p), index, name, position, p)
            for position, group in enumerate(self.groups)
            for p, index, name in zip(group.params, group.indices, group.names, strict=True)
        ]
        check_alike([s.name for s in sources if s.is_distributed], self._settings)
        self._sources = {id(source.parameter): source for source in sources}
        if self._settings.structure == "low_rank":
            self._low_rank = LowRank(self._sources.values(), self._settings.backend)

    @property
    def sources(self) -> Mapping[int, Source]:
        """By ``id`` of the parameter."""
        return self._sources

    @property
    def shifts(self) -> Sequence[Shift]:
        """One a group, where all examples share them."""
        return self._shifts

    @property
    def per_example(self) -> bool:
        return self._settings.directions == "per_example"

    def move(self, sample: int, sign: int) -> None:
        self._go(At(sample, sign, shared=not self.per_example))

    def restore(self) -> None:
        self.written.put_back()
        self._go(At())

    @contextmanager
    def at(self, **changes: Any) -> Iterator[None]:
        """Evaluate there instead for a while, see :class:`At`."""
        before = self._at
        self._go(before._replace(**changes))
        try:
            yield
        finally:
            self._go(before)

    def _go(self, at: At) -> None:
        self._at = at
        self._shifts = self.shifts_of(at.sample) if at.sign and at.shared else []

    def update(self, updates: Sequence[Update]) -> None:
        self.forms = None
        if self._low_rank is not None:
            self._low_rank.forget()
        super().update(updates)

    def shifts_of(self, sample: int, side: int = 1) -> list[Shift]:
        """One a group."""
        sign = self._at.factor * self._at.sign * side
        return [self._shift(group, sample, sign) for group in self.groups]

    def _run(self, evaluate: Run, gradient: float) -> Evaluation:
        if not self._sources:
            return evaluate(gradient, None)
        if self._at.sign and self._at.shared:
            return self._run_at(evaluate, gradient, self._closed_forms())
        if self._at.sign:
            return self._run_by_example(evaluate, gradient)
        with uncompiled():
            found = evaluate(gradient, None)
        if self.per_example:
            self._examples = self._counted(found)
        return found

    def _run_at(self, evaluate: Run, gradient: float, forms: ClosedForms | None) -> Evaluation:
        displaced = self.written.ids
        self.forms = forms
        saved = SavedCopies() if gradient else None
        answer = Streaming(
            self._sources, self._shifts, self._settings.backend, displaced, forms, saved
        )
        with uncompiled(), nullcontext() if saved is None else saved.unkept():
            return evaluate(gradient, answer)

    def _closed_forms(self) -> ClosedForms | None:
        wanted = self._at.closed
        if self._low_rank is None or (wanted is not None and not wanted):
            return None
        closed = {
            where: source
            for where, source in self._sources.items()
            if where not in self.written.ids
            and (
                wanted is None
                or where in wanted
                # a bias is displaced with its product
                or matrix_of(source.parameter.shape) is None
            )
            and not source.is_distributed
        }
        if not closed:
            return None
        at = Displacement(self._low_rank, [self._shifts])
        return ClosedForms(closed, lambda _: at)

    # ---- examples with directions of their own ----------------------------------------------

    def place(self, displacement: int, count: int) -> tuple[int, int]:
        """The direction of one of ``count`` displacements of the batch, and its side of it."""
        sample, second = divmod(displacement, self.sides)
        sample = self.replicas.direction(sample, count // self.sides)
        return self._first_direction + sample, -1 if second else 1

    @property
    def examples_per_direction(self) -> int:
        return self._settings.examples_per_direction

    @property
    def sides(self) -> int:
        """Of a direction, in one evaluation."""
        return self._settings.sides

    def _counted(self, found: Evaluation) -> int:
        """The number of examples.

        Raises:
            ValueError: they cannot be divided among directions.
        """
        count, multiple = found.loss.numel(), self._settings.examples_of_a_direction
        if count % multiple:
            raise ValueError(
                f"closure must return a multiple of {multiple} losses where estimator="
                f"{self._settings.estimator!r} and examples_per_direction="
                f"{self._settings.examples_per_direction}, got {count}"
            )
        return count

    def _run_by_example(self, evaluate: Run, gradient: float) -> Evaluation:
        """Where no loss has told how many examples there are, the first input's length is taken
        for it; where that was wrong, all is done again, and the next batch is taken to have as
        many as this one."""
        if self._examples is None:
            guessed: Evaluation | None = None
            with suppress(NoOwner):
                guessed = self._run_examples(evaluate, gradient, self._guess)
                self._examples = self._counted(guessed)
            knew = self.forms is None or self.forms.examples in (None, self._examples)
            if self.together(guessed is not None and knew) and guessed is not None:
                return guessed
            if not self.together(guessed is not None):
                with uncompiled():
                    self._examples = self._counted(evaluate(0.0, None))
            self._guess = self._examples
        found = self._run_examples(evaluate, gradient, self._examples)
        if found.loss.numel() != self._examples:
            raise ValueError(
                "closure must return as many losses whenever it is called in a step, got "
                f"{found.loss.numel()} after {self._examples}"
            )
        return found

    def _run_examples(self, evaluate: Run, gradient: float, examples: int | None) -> Evaluation:
        low_rank, settings = self._low_rank, self._settings
        assert low_rank is not None

        def displaced(count: int) -> Displacement:
            at = [self.shifts_of(*self.place(number, count)) for number in range(count)]
            alone = self._at.alone
            if alone is not None:
                at = [
                    [shift._replace(scale=shift.scale * (k in alone)) for shift in shifts]
                    for k, shifts in enumerate(at)
                ]
            return Displacement(low_rank, at, self.sides)

        forms = ClosedForms(
            self._sources,
            displaced,
            per_example=True,
            each=settings.examples_per_direction,
            multiple=settings.examples_of_a_direction,
            examples=examples,
        )
        return self._run_at(evaluate, gradient, forms)

    # ---- verification -----------------------------------------------------------------------

    def together(self, flag: bool) -> bool:
        """Whether it is true in all processes that run forward passes together."""
        return self.agree(flag) if self.stand_ins.modules else flag

    def _tells_all(self, loss: Tensor) -> bool:
        # one displacement alone cannot mix with others
        return not self.per_example or len(loss) > self.examples_per_direction

    def _tells(self, loss: Tensor) -> bool:
        finite = loss.isfinite()
        return bool(finite.any() if self.sides == 2 else finite.all())

    def _verify_once(
        self, evaluate: Callable[[], Tensor], loss: Tensor, graph: bool = False
    ) -> None:
        """Of all that ever move, or the first steps would each verify what moves in them."""
        moving, at = self.groups, self._at
        activity = self._settings.activity
        if activity is not None and activity.changes and self.agree(self._tells(loss)):
            self.over(self._tables.ever_active(self._whole, activity))
            self._go(at)
            try:
                there = evaluate()
                if self.agree(self._tells(there)):
                    super()._verify_once(evaluate, there)
                    return
            finally:
                self.over(moving)
                self._go(at)
        super()._verify_once(evaluate, loss, graph)

    def verify(self, evaluate: Callable[[], Tensor], loss: Tensor) -> Tensor | None:
        """See also :class:`Verification`."""
        again = super().verify(evaluate, loss)
        if again is None:  # else nothing can be said
            Verification(self, evaluate, self._advice).check(self._at.sample, loss)
        return again

    def _of_two_losses(self, loss: Tensor, again: Tensor) -> str:
        return (
            f"{super()._of_two_losses(loss, again)}. Nor can it be verified that "
            "perturbation='streamed' reaches every use of the zeroth-order parameters"
        )
