"""Perturbation without writing: torch functions get perturbed copies of the parameters.

While a loss is evaluated at w + scale v, a torch-function mode sees every torch call and replaces
each zeroth-order parameter among its arguments by a fresh, perturbed copy. A copy lives as long as
the call needs it; the weights themselves are written by updates only, so they cannot drift.

Compiled code makes no torch calls, so ``torch.compile`` is off while a closure is evaluated, also
at w itself: losses that are subtracted come from the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from zofo_kernels import Shift, matrix_of, perturb_, uninterrupted
from zofo_kernels._torch_compat import set_version

from ..advice import Advice
from ..evaluation import Evaluation
from ..listeners import Listener
from ..settings import Settings
from ..update import Update
from ..zo_groups import ZOGroup
from .base import Perturbation, Run, same, shown, written
from .closed_forms import ClosedForms, NoOwner
from .low_rank import Displacement, LowRank, Source
from .streaming import Streaming, uncompiled

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of losses, relative where they are above 1, by the coarsest dtype that a form gives: models of
float64 compute parts in float32."""
_ENOUGH = {torch.float64: 100, torch.float32: 100, torch.float16: 4, torch.bfloat16: 2}
"""By so many tolerances a displacement must change a loss, for it to be verified there."""
_FACTORS = tuple(4**k for k in range(8))
"""Of mu, one after the other until that is so."""
_FARTHEST = 0.3
"""Of displacements: beyond, 16-bit models give nothing but rounding."""


class StreamedPerturbation(Perturbation):
    """Evaluations see perturbed copies of the weights, which are written by updates only."""

    def __init__(self, settings: Settings, listener: Listener, advice: Advice) -> None:
        super().__init__(settings, listener, advice)
        self._shifts: list[Shift] = []
        self._kept: dict[int, _Kept] = {}  # parameters that verification displaces
        self._sources: dict[int, Source] = {}
        self._low_rank: LowRank | None = None
        self._forms: ClosedForms | None = None  # of the last evaluation
        self._closed: Collection[int] | None = None  # ids of matrices; None: all that can be
        self._sample = self._sign = 0
        self._factor = 1  # of mu, in the verification
        self._alone: Collection[int] | None = None  # examples; None: all
        self._guess: int | None = None  # examples of a batch; None: as its first input says

    def over(self, groups: list[ZOGroup]) -> StreamedPerturbation:
        self._put_back()
        super().over(groups)
        if self._low_rank is not None and self._low_rank.is_outdated():
            self._low_rank = LowRank(self._sources.values(), self._settings.backend)
        return self

    def _renew(self) -> None:
        self._sources = {
            id(parameter): Source(parameter, index, name, position)
            for position, group in enumerate(self.groups)
            for parameter, index, name in zip(group.params, group.indices, group.names, strict=True)
        }
        if self._settings.structure == "low_rank":
            self._low_rank = LowRank(self._sources.values(), self._settings.backend)

    def move(self, sample: int, sign: int) -> None:
        self._sample, self._sign = sample, sign
        if not self._per_example:
            self._shifts = self._shifts_of(sample)

    def restore(self) -> None:
        self._put_back()
        self._sign, self._shifts = 0, []

    def update(self, updates: Sequence[Update]) -> None:
        self._forms = None
        if self._low_rank is not None:
            self._low_rank.forget()
        super().update(updates)

    def _shifts_of(self, sample: int) -> list[Shift]:
        return [self._shift(group, sample, self._factor * self._sign) for group in self.groups]

    def _run(self, evaluate: Run, gradient: bool) -> Evaluation:
        if not self._sources:
            return evaluate(gradient, None)
        if self._shifts:  # all examples share them
            return self._run_at(evaluate, gradient, self._closed_forms())
        if self._sign:
            return self._run_by_example(evaluate, gradient)
        with uncompiled():
            found = evaluate(gradient, None)
        self._examples = found.loss.numel()
        return found

    def _run_at(self, evaluate: Run, gradient: bool, forms: ClosedForms | None) -> Evaluation:
        displaced = self._kept.keys()
        self._forms = forms
        answer = Streaming(self._sources, self._shifts, self._settings.backend, displaced, forms)
        with uncompiled():
            return evaluate(gradient, answer)

    def _closed_forms(self) -> ClosedForms | None:
        if self._low_rank is None or (self._closed is not None and not self._closed):
            return None
        closed = {
            where: source
            for where, source in self._sources.items()
            if where not in self._kept
            and (
                self._closed is None
                or where in self._closed
                # a bias is displaced with its product
                or matrix_of(source.parameter.shape) is None
            )
        }
        at = Displacement(self._low_rank, [self._shifts])
        return ClosedForms(closed, lambda _: at)

    # ---- one direction an example -----------------------------------------------------------

    @property
    def _per_example(self) -> bool:
        return self._settings.directions == "per_example"

    def _run_by_example(self, evaluate: Run, gradient: bool) -> Evaluation:
        """Where no loss has told how many examples there are, the first input's length is taken
        for it; where that was wrong, all is done again, and the next batch is taken to have as
        many as this one."""
        if self._examples is None:
            try:
                found = self._run_examples(evaluate, gradient, self._guess)
                self._examples = found.loss.numel()
                if self._forms is None or self._forms.examples in (None, self._examples):
                    return found
            except NoOwner:
                with uncompiled():
                    self._examples = evaluate(False, None).loss.numel()
            self._guess = self._examples
        found = self._run_examples(evaluate, gradient, self._examples)
        if found.loss.numel() != self._examples:
            raise ValueError(
                "closure must return as many losses whenever it is called in a step, got "
                f"{found.loss.numel()} after {self._examples}"
            )
        return found

    def _run_examples(self, evaluate: Run, gradient: bool, examples: int | None) -> Evaluation:
        low_rank, first = self._low_rank, self._first_example
        assert low_rank is not None

        def displaced(count: int) -> Displacement:
            at = [self._shifts_of(first + example) for example in range(count)]
            if self._alone is not None:  # in the verification
                at = [
                    [shift._replace(scale=shift.scale * (k in self._alone)) for shift in shifts]
                    for k, shifts in enumerate(at)
                ]
            return Displacement(low_rank, at)

        forms = ClosedForms(self._sources, displaced, per_example=True, examples=examples)
        return self._run_at(evaluate, gradient, forms)

    # ---- verification -----------------------------------------------------------------------

    def verify(self, evaluate: Callable[[], Tensor], loss: Tensor) -> Tensor | None:
        """Compare also with evaluations in which the weights themselves are perturbed, in parts.

        Parts are as large as the largest weight, whose content is kept aside: the weights are
        written, and then restored to the bit. Torch functions get copies of these too, so that
        the loss is the same to the bit unless something else reads the weights.

        Raises:
            RuntimeError: the loss depends on a weight in a way that torch functions do not see;
                names the parameters.
        """
        again = super().verify(evaluate, loss)
        if again is not None:  # then nothing can be said
            return again
        try:
            if self._per_example:
                loss = self._verify_examples(evaluate)
            elif self._low_rank is not None:
                loss = self._verify_closed_forms(evaluate)
            self._verify_uses(evaluate, loss)
        finally:
            self._factor = 1
            self._shifts = [] if self._per_example else self._shifts_of(self._sample)
        return None

    def _level(self, loss: Tensor) -> int:
        return int(self._per_example and len(loss) > 1)  # one example alone cannot mix

    def _verify_uses(self, evaluate: Callable[[], Tensor], loss: Tensor) -> None:
        with self._in_closed_form(()):
            missed = [
                name
                for part in _parts(list(self._sources.values()))
                for name in _wrong(part, lambda some: self._are_seen(some, evaluate, loss))
            ]
        if missed:
            raise RuntimeError(
                "closure must use zeroth-order parameters through torch functions where "
                "perturbation='streamed', but these reach the loss in another way (an extension, "
                "a raw pointer, a view made earlier): "
                + ", ".join(missed)
                + "; use perturbation='in_place'"
            )

    def _verify_examples(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """An example's loss is that under its direction alone; the others do not depend on it.

        Leaves the last example's direction to all, for what is verified next.

        Returns:
            The losses there, by copies.

        Raises:
            RuntimeError: not so.
        """
        at_rest = self._with_alone((), evaluate)
        last = len(at_rest) - 1
        own = self._first_example + last
        by_copies, room = self._far_enough(evaluate, own, at_rest, lambda losses: losses[last])
        self._shifts = []
        for some, others in _halves(len(at_rest)):
            moved = (self._with_alone(some, evaluate) - at_rest)[others]
            if moved.any():
                raise RuntimeError(
                    "closure must compute the loss of each example from that example alone, and "
                    "keep their order, where directions='per_example': displacing the weights for "
                    f"some examples changed the losses of others (by up to {moved.abs().max():.3g}"
                    "). Batch normalisation, packed or sorted examples and experts of limited "
                    "capacity mix them; use directions='shared'"
                )
        beside, alone = evaluate()[last].item(), by_copies[last].item()
        if not abs(beside - alone) <= room:
            raise RuntimeError(
                "closure must lead with the examples, or with their rows in order, in every layer "
                f"where directions='per_example': example {last} has the loss {beside:.8g} beside "
                f"others, and {alone:.8g} where the whole batch has its direction; use "
                "directions='shared'"
            )
        self._shifts = self._shifts_of(own)
        return by_copies

    def _far_enough(
        self,
        evaluate: Callable[[], Tensor],
        sample: int,
        at_rest: Tensor,
        of: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, float]:
        """Go along a direction until the loss has changed by more than rounding can.

        Args:
            sample: of the direction.
            at_rest: what ``evaluate`` gives at the weights.
            of: the loss to look at, of what ``evaluate`` gives.

        Returns:
            What ``evaluate`` gives there by copies, and by how much closed forms may differ.
        """
        assert self._forms is not None
        coarsest, rest = self._forms.coarsest, of(at_rest).item()
        found: Tensor | None = None
        farthest = _FARTHEST / max(group.mu for group in self.groups)
        for factor in [f for f in _FACTORS if f == 1 or f <= farthest]:
            before, self._factor = self._factor, factor
            self._shifts = self._shifts_of(sample)
            with self._in_closed_form(()):
                there = evaluate()
            if found is not None and not there.isfinite().all():
                self._factor = before
                self._shifts = self._shifts_of(sample)
                break
            found, value = there, of(there).item()
            room = TOLERANCE[coarsest] * max(1.0, abs(value))
            enough = abs(value - rest) / _ENOUGH[coarsest]
            if enough >= room:
                if torch.finfo(coarsest).bits == 16:
                    room = enough  # so far away, all is a little off
                break
        assert found is not None
        return found, room

    def _with_alone(self, some: Collection[int], evaluate: Callable[[], Tensor]) -> Tensor:
        """Losses where only these examples are displaced."""
        self._alone = some
        try:
            return evaluate()
        finally:
            self._alone = None

    def _verify_closed_forms(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """Compare with an evaluation by copies.

        Returns:
            The loss by copies.

        Raises:
            RuntimeError: another loss; names the parameters.
        """
        sign, self._sign, self._shifts = self._sign, 0, []
        at_rest = evaluate()
        self._sign = sign
        by_copies, room = self._far_enough(evaluate, self._sample, at_rest, Tensor.mean)

        def is_near(found: Tensor) -> bool:
            return abs((found.mean() - by_copies.mean()).item()) <= room

        def are_right(some: Sequence[Source]) -> bool:
            with self._in_closed_form({id(s.parameter) for s in some}):
                return is_near(evaluate())

        loss = evaluate()
        if not is_near(loss):
            raise RuntimeError(
                f"closure gave the loss {shown(loss)} by closed forms of low-rank directions, "
                f"and {shown(by_copies)} with perturbed copies of the weights: something reads "
                "these zeroth-order parameters' layers in another way than a product with them: "
                + ", ".join(_wrong(list(self._sources.values()), are_right))
                + "; use structure='full', or perturbation='in_place'"
            )
        return by_copies

    @contextmanager
    def _in_closed_form(self, parameters: Collection[int]) -> Iterator[None]:
        """Only these, by ``id``; all others by copies."""
        self._closed = parameters
        try:
            yield
        finally:
            self._closed = None

    def _of_two_losses(self, loss: Tensor, again: Tensor) -> str:
        return (
            f"{super()._of_two_losses(loss, again)}. Nor can it be verified that "
            "perturbation='streamed' reaches every use of the zeroth-order parameters"
        )

    def _are_seen(
        self, part: Sequence[Source], evaluate: Callable[[], Tensor], loss: Tensor
    ) -> bool:
        """Whether streaming perturbs these parameters wherever they are used."""
        with self._written(part):
            return same(evaluate(), loss)

    @contextmanager
    def _written(self, part: Sequence[Source]) -> Iterator[None]:
        """These weights are perturbed in place; then restored to the bit."""
        self._kept = {
            id(s.parameter): _Kept(s.parameter, s.parameter.detach().clone(), written(s.parameter))
            for s in part
        }
        try:
            for source in part:
                shift = self._shifts[source.group]
                perturb_(
                    [source.parameter],
                    shift.direction,
                    shift.scale,
                    indices=[source.noise_index],
                    backend=self._settings.backend,
                )
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        """Where a write fails, the others are done, and the next call tries it again."""
        failed: BaseException | None = None
        with uninterrupted(), torch.inference_mode():  # where torch may write all tensors
            for where, kept in list(self._kept.items()):
                try:
                    if kept.failed is None or kept.failed == written(kept.parameter):
                        kept.parameter.copy_(kept.content)
                        if not kept.parameter.is_inference():
                            set_version(kept.parameter, kept.before[1])  # for graphs that saved it
                    del self._kept[where]
                except BaseException as error:
                    failed = failed or error
                    self._kept[where] = kept._replace(failed=written(kept.parameter))
        if failed is not None:
            raise failed


class _Kept(NamedTuple):
    """A parameter that verification displaces, and its content before."""

    parameter: Tensor
    content: Tensor
    before: tuple[int, int]
    """The parameter then, see :func:`written`."""
    failed: tuple[int, int] | None = None
    """Where putting it back failed: the parameter as it was then, likewise."""


def _wrong(some: Sequence[Source], are_right: Callable[[Sequence[Source]], bool]) -> list[str]:
    """Names of those that make the rest wrong; all, where none does by itself."""
    if are_right(some):
        return []
    if len(some) == 1:
        return [some[0].name]
    half = len(some) // 2
    found = _wrong(some[:half], are_right) + _wrong(some[half:], are_right)
    return found or [source.name for source in some]


def _halves(count: int) -> Iterator[tuple[list[int], list[int]]]:
    """The numbers below ``count`` in two parts, so often that any two of them are once apart."""
    for bit in range((count - 1).bit_length()):
        ones = [k for k in range(count) if k >> bit & 1]
        zeros = [k for k in range(count) if not k >> bit & 1]
        yield ones, zeros
        yield zeros, ones


def _parts(sources: list[Source]) -> Iterator[list[Source]]:
    """Runs of parameters of together at most the largest one's bytes."""
    sizes = [s.parameter.numel() * s.parameter.element_size() for s in sources]
    room = max(sizes, default=0)
    part: list[Source] = []
    used = 0
    for source, size in zip(sources, sizes, strict=True):
        if part and used + size > room:
            yield part
            part, used = [], 0
        part.append(source)
        used += size
    if part:
        yield part
