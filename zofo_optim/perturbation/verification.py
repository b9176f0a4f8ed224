"""The first step's questions to a closure: does it use the weights as streaming takes it to?

Low-rank directions are evaluated by closed forms, and with one direction an example each row of a
batch by its own: that is compared with perturbed copies. Copies are made for torch functions: that
is compared with weights that are perturbed themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..advice import Advice
from .base import same, shown
from .low_rank import Source

if TYPE_CHECKING:
    from .streamed import StreamedPerturbation

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of losses, relative where they are above 1, by the coarsest dtype that a form gives: models of
float64 compute parts in float32."""
_ENOUGH = {torch.float64: 100, torch.float32: 100, torch.float16: 4, torch.bfloat16: 2}
"""By so many tolerances a displacement must change a loss, for it to be verified there."""
_FACTORS = tuple(4**k for k in range(8))
"""Of mu, one after the other until that is so."""
_FARTHEST = 0.3
"""Of displacements: beyond, 16-bit models give nothing but rounding."""


_Halves = tuple[list[int], list[int]]
"""Numbers, and the others."""


class _There(NamedTuple):
    """A point far enough along a direction to tell something."""

    place: dict[str, Any]
    """See :class:`.streamed.At`."""
    by_copies: Tensor
    """What the closure gives there."""
    room: float
    """By how much closed forms may differ."""


class Verification:
    """Compares ways of evaluating the same point.

    Args:
        perturbation: at a displaced point; it is moved, and put back.
        evaluate: evaluates the loss, or the examples' losses, where the perturbation is.
        advice: says once what is odd.
    """

    def __init__(
        self, perturbation: StreamedPerturbation, evaluate: Callable[[], Tensor], advice: Advice
    ) -> None:
        self._perturbation, self._advice = perturbation, advice
        self._evaluate = evaluate
        self._sources = list(perturbation.sources.values())
        self._forms = perturbation.forms
        self._agree = perturbation.agree

    def check(self, sample: int, loss: Tensor) -> None:
        """All processes that train the model take the same decisions.

        Args:
            sample: whose direction the perturbation is at.
            loss: there.

        Raises:
            RuntimeError: the loss depends on a weight in a way that is not displaced, or is
                displaced otherwise; names the parameters.
        """
        place: dict[str, Any] = {}
        if self._perturbation.per_example:
            place, loss, _ = self._check_examples()
        elif self._forms is not None:
            place, loss, _ = self._check_closed_forms(sample)
        if self._perturbation.stand_ins.modules:  # shards of one weight are displaced alike
            place = {**place, "sample": 0, "sign": 1}
            loss = self._at(**place, closed=())
        with self._perturbation.at(**place, closed=()):
            self._check_uses(loss)

    def _at(self, **changes: Any) -> Tensor:
        """What the closure gives there."""
        with self._perturbation.at(**changes):
            return self._evaluate()

    def _in_step(self, halves: Iterator[_Halves]) -> Iterator[_Halves]:
        """Until all processes have had theirs, with none for those that are through."""
        none: _Halves = ([], [])
        while not self._agree((next_one := next(halves, none)) is none):
            yield next_one

    def _check_uses(self, loss: Tensor) -> None:
        """Compare with weights that are perturbed themselves, in parts, and restored to the bit.

        Parts are as large as the largest weight, whose content is kept aside. Torch functions get
        copies of these too, so that the loss is the same to the bit unless something else reads
        the weights.
        """
        missed = [
            name
            for part in _parts(self._sources)
            for name in _wrong(part, lambda some: self._are_seen(some, loss))
        ]
        if missed:
            raise RuntimeError(
                "closure must use zeroth-order parameters through torch functions where "
                "perturbation='streamed', but these reach the loss in another way (an extension, "
                "a raw pointer, a view made earlier): "
                + ", ".join(missed)
                + "; use perturbation='in_place'"
            )

    def _are_seen(self, part: Sequence[Source], loss: Tensor) -> bool:
        """Whether streaming perturbs these parameters wherever they are used."""
        with self._perturbation.written.displaced(part, self._perturbation.shifts):
            return self._agree(same(self._evaluate(), loss))

    def _check_examples(self) -> _There:
        """An example's loss is that under its direction alone; the others do not depend on it."""
        at_rest, each = self._at(alone=()), self._perturbation.examples_per_direction
        self._advise_of_pairs(at_rest)
        last = int(at_rest.isfinite().nonzero()[-1])
        sample, side = self._perturbation.place(last // each, len(at_rest) // each)
        there = self._far_enough(sample, at_rest, lambda losses: losses[last], side)
        factor = abs(there.place["factor"])
        for some, others in self._in_step(_halves(len(at_rest) // each)):
            found = self._at(factor=factor, alone=some)
            moved = torch.where(found.isnan() & at_rest.isnan(), 0.0, found - at_rest)
            moved = moved.view(-1, each)[others]
            if not self._agree(not moved.ne(0).any()):
                by = moved.abs().max() if moved.numel() else 0.0
                raise RuntimeError(
                    "closure must compute the loss of each example from that example alone, and "
                    "keep their order, where directions='per_example': displacing the weights for "
                    f"some examples changed the losses of others (by up to {by:.3g}). "
                    "Batch normalisation, packed or sorted examples and experts of limited "
                    "capacity mix them; use directions='shared'"
                )
        assert self._forms is not None
        coarsest = self._forms.coarsest
        if self._perturbation.sides == 2 and torch.finfo(coarsest).bits == 16:
            return there  # rounding may change a text, and so its score
        beside, alone = self._at(factor=factor)[last].item(), there.by_copies[last].item()
        if not self._agree(abs(beside - alone) <= there.room):
            raise RuntimeError(
                "closure must lead with the examples, or with their rows in order, in every layer "
                f"where directions='per_example': example {last} has the loss {beside:.8g} beside "
                f"others, and {alone:.8g} where the whole batch has its direction; use "
                "directions='shared'"
            )
        return there

    def _advise_of_pairs(self, at_rest: Tensor) -> None:
        """Where the two sides of directions differ already at rest."""
        assert self._forms is not None
        if self._perturbation.sides == 1:
            return
        sides = at_rest.view(-1, 2, self._perturbation.examples_per_direction)
        apart = (sides[:, 0] - sides[:, 1]).abs()
        room = TOLERANCE[self._forms.coarsest] * sides.abs().amax(1).clamp(min=1.0)
        wide = apart[apart > room]
        if len(wide):
            self._advice.once(
                "pairs",
                "closure gave the two sides of a direction different losses although no weight was "
                f"displaced (by up to {wide.max():.3g}), which hides what the displacement does: "
                "with estimator='antithetic' the examples of a pair must be the same, without "
                "dropout (model.eval()), and sampled within zofo_optim.common_noise(optimizer)",
            )

    def _check_closed_forms(self, sample: int) -> _There:
        """They give the loss that copies give."""
        there = self._far_enough(sample, self._at(sign=0), Tensor.mean)

        def is_near(found: Tensor) -> bool:
            return self._agree(abs((found.mean() - there.by_copies.mean()).item()) <= there.room)

        def are_right(some: Sequence[Source]) -> bool:
            return is_near(self._at(**there.place, closed={id(s.parameter) for s in some}))

        loss = self._at(**there.place)
        if not is_near(loss):
            raise RuntimeError(
                f"closure gave the loss {shown(loss)} by closed forms of low-rank directions, "
                f"and {shown(there.by_copies)} with perturbed copies of the weights: something "
                "reads these zeroth-order parameters' layers in another way than a product with "
                "them: "
                + ", ".join(_wrong(self._sources, are_right))
                + "; use structure='full', or perturbation='in_place'"
            )
        return there

    def _far_enough(
        self, sample: int, at_rest: Tensor, of: Callable[[Tensor], Tensor], side: int = 1
    ) -> _There:
        """Go along a direction until the loss has changed by more than rounding can.

        Args:
            sample: of the direction.
            at_rest: what the closure gives at the weights.
            of: the loss to look at, of what the closure gives.
            side: -1 for the other way.
        """
        assert self._forms is not None
        coarsest, rest = self._forms.coarsest, of(at_rest).item()
        found: _There | None = None
        farthest = _FARTHEST / max(group.displacement for group in self._perturbation.groups)
        for factor in [f for f in _FACTORS if f == 1 or f <= farthest]:
            place = dict(sample=sample, factor=factor * side, shared=True)
            there = self._at(**place, closed=())
            finite = self._agree(bool(there.isfinite().all()))
            if found is not None and not finite:
                break
            value = of(there).item()
            room = TOLERANCE[coarsest] * max(1.0, abs(value))
            enough = abs(value - rest) / _ENOUGH[coarsest]
            if not self._agree(not enough < room):  # NaN is far, too
                found = _There(place, there, room)
                continue
            # so far away, all is a little off: the more, the farther
            share = {16: 1.0, 32: 0.25, 64: 0.0}[torch.finfo(coarsest).bits]
            return _There(place, there, max(room, share * enough))
        assert found is not None
        return found


def _wrong(some: Sequence[Source], are_right: Callable[[Sequence[Source]], bool]) -> list[str]:
    """Names of those that make the rest wrong; all, where none does by itself."""
    if are_right(some):
        return []
    if len(some) == 1:
        return [some[0].name]
    half = len(some) // 2
    found = _wrong(some[:half], are_right) + _wrong(some[half:], are_right)
    return found or [source.name for source in some]


def _halves(count: int) -> Iterator[_Halves]:
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
