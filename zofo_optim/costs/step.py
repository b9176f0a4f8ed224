"""A recorded training step, repeated to see its memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .recorded import Trace
from .replay import Peaks, Replay
from .sets import union
from .trial import OptimizerMemory


class Step:
    """A recorded step, to be repeated.

    Args:
        recorded: the forward.
        memory: of the optimizer, by tensor.
        together: the optimizer updates all tensors at once, and so has the workspace of all.
    """

    def __init__(
        self, recorded: Trace, memory: Mapping[str, OptimizerMemory], together: bool
    ) -> None:
        self._trace = recorded
        self._memory = dict(memory)
        self._together = together
        self._replay = Replay(recorded)
        self._known: dict[tuple[int, bool, bool], Peaks] = {}

    def peaks(
        self, names: Collection[str], in_backward: bool = False, *, again: bool = False
    ) -> Peaks:
        """See :class:`Peaks`; without names, of a forward without gradients.

        Args:
            again: gradients are added to those that are there, which do not count here.
        """
        chosen = union(self._trace.bits[name] for name in names)
        if names:
            chosen |= self._trace.always
        key = chosen, in_backward, again
        if key not in self._known:
            updates = {self._trace.bits[name]: m.workspace for name, m in self._memory.items()}
            applied = {} if again else updates if in_backward else None
            self._known[key] = self._replay.run(chosen, applied)
        return self._known[key]

    def workspace(self, names: Collection[str], in_backward: bool) -> int:
        """What the update takes beside gradients and state."""
        sizes = [self._memory[name].workspace for name in names]
        if in_backward:
            return 0  # it is in the peak of the backward
        return sum(sizes) if self._together else max(sizes, default=0)
