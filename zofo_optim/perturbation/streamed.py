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

from zofo_kernels import Shift, perturb_, uninterrupted
from zofo_kernels._torch_compat import set_version

from ..advice import Advice
from ..evaluation import Evaluation
from ..listeners import Listener
from ..settings import Settings
from ..zo_groups import ZOGroup
from .base import Evaluate, Perturbation, same, written
from .closed_forms import ClosedForms
from .low_rank import Displacement, LowRank, Source
from .streaming import Streaming, uncompiled


TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of losses, relative where they are above 1, by the coarsest dtype that a form gives: models of
float64 compute parts in float32."""


class StreamedPerturbation(Perturbation):
    """Evaluations see perturbed copies of the weights, which are written by updates only."""

    def __init__(self, settings: Settings, listener: Listener, advice: Advice) -> None:
        super().__init__(settings, listener, advice)
        self._shifts: list[Shift] = []
        self._mode: Streaming | None = None
        self._kept: dict[int, _Kept] = {}  # parameters that verification displaces
        self._sources: dict[int, Source] = {}
        self._low_rank: LowRank | None = None
        self._forms: ClosedForms | None = None  # of the last evaluation
        self._closed: Collection[int] | None = None  # ids; None: all that can be

    def over(self, groups: list[ZOGroup]) -> StreamedPerturbation:
        self._put_back()
        super().over(groups)
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
        self._shifts = [self._shift(group, sample, sign) for group in self.groups]

    def restore(self) -> None:
        self._put_back()
        self._shifts = []

    def _run(self, evaluate: Evaluate, gradient: bool) -> Evaluation:
        if not self._sources:
            return evaluate(gradient)
        if not self._shifts:
            with uncompiled():
                return evaluate(gradient)
        displaced = self._kept.keys()
        self._forms = None if self._low_rank is None else self._closed_forms(self._low_rank)
        self._mode = Streaming(
            self._sources, self._shifts, self._settings.backend, displaced, self._forms
        )
        with uncompiled(), self._mode:
            return evaluate(gradient)

    def _closed_forms(self, low_rank: LowRank) -> ClosedForms | None:
        closed = {
            where: source
            for where, source in self._sources.items()
            if where not in self._kept and (self._closed is None or where in self._closed)
        }
        if not closed:
            return None
        return ClosedForms(closed, Displacement(low_rank, [self._shifts]), per_example=False)

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
        if self._low_rank is not None:
            loss = self._verify_closed_forms(evaluate, loss)
        with self._in_closed_form(()):
            missed = [
                name
                for part in _parts(list(self._sources.values()))
                for name in self._unseen(part, evaluate, loss)
            ]
        if missed:
            raise RuntimeError(
                "closure must use zeroth-order parameters through torch functions where "
                "perturbation='streamed', but these reach the loss in another way (an extension, "
                "a raw pointer, a view made earlier): "
                + ", ".join(missed)
                + "; use perturbation='in_place'"
            )
        return None

    def _verify_closed_forms(self, evaluate: Callable[[], Tensor], loss: Tensor) -> Tensor:
        """Compare with an evaluation by copies, whose loss is returned.

        Raises:
            RuntimeError: another loss; names the parameters.
        """
        assert self._forms is not None
        room = TOLERANCE[self._forms.coarsest] * max(1.0, abs(loss.item()))
        with self._in_closed_form(()):
            by_copies = evaluate()

        def wrong(some: Sequence[Source]) -> list[str]:
            with self._in_closed_form({id(s.parameter) for s in some}):
                if abs((evaluate() - by_copies).item()) <= room:
                    return []
            if len(some) == 1:
                return [some[0].name]
            half = len(some) // 2
            return wrong(some[:half]) + wrong(some[half:]) or [s.name for s in some]

        if not abs((loss - by_copies).item()) <= room:
            raise RuntimeError(
                f"closure gave the loss {loss.item():.8g} by closed forms of low-rank directions, "
                f"and {by_copies.item():.8g} with perturbed copies of the weights: something reads "
                "these zeroth-order parameters' layers in another way than a product with them: "
                + ", ".join(wrong(list(self._sources.values())))
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

    def _unseen(
        self, part: list[Source], evaluate: Callable[[], Tensor], loss: Tensor
    ) -> list[str]:
        """Names of the parameters in ``part`` that streaming does not perturb everywhere."""
        with self._written(part):
            seen = same(evaluate(), loss)
        if seen:
            return []
        if len(part) == 1:
            return [part[0].name]
        half = len(part) // 2
        found = [
            name
            for some in (part[:half], part[half:])
            for name in self._unseen(some, evaluate, loss)
        ]
        return found or [source.name for source in part]

    @contextmanager
    def _written(self, part: list[Source]) -> Iterator[None]:
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
            if self._mode is not None:
                self._mode.stop()
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
