"""Listeners: told what an optimizer does to its zeroth-order weights, as it happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .update import Update

if TYPE_CHECKING:
    from .optimizer import HybridZOFO


class Move(NamedTuple):
    """A pass over all ZO groups, to w + scale v of direction ``sample``, a scale for each group.

    Scales are 0 where the pass restored w.
    """

    sample: int
    scales: tuple[float, ...]


class Estimated(NamedTuple):
    """What one estimate found. All tensors are on the loss's device, detached."""

    loss: Tensor
    """0-dim: the clean loss; the mean of the perturbed ones where no clean one was taken."""
    losses: Tensor
    """Of every evaluation, in order, shape (evaluations,); of B examples, (evaluations, B)."""
    slopes: Tensor
    """The projected gradients, shape (ZO groups, directions); non-finite ones are 0."""
    finite: Tensor
    """0-dim bool: all of them were finite. Others are skipped."""


class Listener:
    """Base class of what :meth:`HybridZOFO.add_listener` takes; methods do nothing by default.

    Called during a step, so a method should be quick and must not wait for the device. One that
    raises ends the call of the optimizer in which it was told, after the others were told too.

    Example:
        >>> class Losses(Listener):
        ...     def __init__(self):
        ...         self.found = []
        ...     def estimated(self, estimated):
        ...         self.found.append(estimated.loss)
        >>> losses = optimizer.add_listener(Losses())
    """

    def moved(self, move: Move) -> None:
        """The weights are about to move in place; streamed perturbation has no moves."""

    def estimated(self, estimated: Estimated) -> None:
        """An estimate was taken; what the step will apply has it once all were told.

        Not told where all groups are first-order.
        """

    def updated(self, updates: Sequence[Update]) -> None:
        """A step has ended; one update a ZO group, in order; none where all are first-order."""

    def state_loaded(self) -> None:
        """A state dict was loaded."""

    def group_adding(self, group: dict[str, Any]) -> None:
        """A ZO group is about to be added, or made anew; raise RuntimeError to refuse it.

        State dicts whose groups hold the parameters otherwise make them anew.
        The optimizer may refuse it still, if the group is not sound.
        """

    def places_changing(self) -> None:
        """Parameters are about to go from group to group; raise RuntimeError to refuse it.

        Noise follows a parameter's place among the zeroth-order ones, so later directions are
        others than they would have been.
        """

    def adding(self, optimizer: HybridZOFO) -> None:
        """This listener is about to be added to ``optimizer``; raise RuntimeError to refuse."""

    def removing(self, optimizer: HybridZOFO) -> None:
        """It is about to be removed from ``optimizer``; raise RuntimeError to refuse."""


class Listeners(Listener):
    """Several as one, told in the order in which they were added."""

    def __init__(self, *first: Listener) -> None:
        self.members = list(first)

    def _tell(self, tell: Callable[[Listener], None]) -> None:
        """Tell all, though one may leave or raise: a journal must not miss what happened."""
        failed: BaseException | None = None
        for listener in tuple(self.members):
            try:
                tell(listener)
            except BaseException as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def moved(self, move: Move) -> None:
        self._tell(lambda listener: listener.moved(move))

    def estimated(self, estimated: Estimated) -> None:
        self._tell(lambda listener: listener.estimated(estimated))

    def updated(self, updates: Sequence[Update]) -> None:
        self._tell(lambda listener: listener.updated(updates))

    def state_loaded(self) -> None:
        self._tell(lambda listener: listener.state_loaded())

    def group_adding(self, group: dict[str, Any]) -> None:
        self._tell(lambda listener: listener.group_adding(group))

    def places_changing(self) -> None:
        self._tell(lambda listener: listener.places_changing())
