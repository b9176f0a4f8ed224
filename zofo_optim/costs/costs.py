"""What first-order training of some of a model's tensors costs: FLOPs and bytes.

How costs are counted. One forward of the closure is recorded, operation by operation, together
with the tensors that each operation depends on. A backward passes the error to an operand of an
operation only where the operand depends on a tensor that trains. What the gradient of each operand
costs, and what the forward keeps for it, is asked of autograd itself on the meta device. So both
are exact for every choice of tensors, from one forward.

FLOPs are those of torch's registry (``torch.utils.flop_counter``): matrix products, convolutions
and attention, two for a multiplication and an addition. Bytes are those of tensors.

Where a mask of attention learns, such as T5's table of positions, a CPU takes attention apart if
the mask trains and fuses it if not. FLOPs follow that; the bytes kept are then a few per cent too
many, and the tensors' shares add up to more than all.

What is not counted: FLOPs of elementwise operations, norms and sums, so that biases and the
vectors of norms cost nothing but the way to them; products inside a kernel for which torch has no
formula, such as a recurrent layer's on the CPU; what kernels and libraries take for themselves,
and the fragmentation of a device's memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .sets import due, members, union
from .step import Step


class TensorCost(NamedTuple):
    """One tensor; all amounts are of one backward."""

    name: str
    numel: int
    weight_flops: int
    """FLOPs of its gradient, over all its uses."""
    path_flops: int
    """FLOPs of passing the error down to it, beyond those for the tensors nearer the loss."""
    gradient_bytes: int
    state_bytes: int
    """What the first-order optimizer keeps for it."""
    path_bytes: int
    """Activations kept for passing the error down to it, likewise beyond the others'."""
    own_bytes: int
    """Activations kept for its gradient, and for no other tensor's."""
    input_bytes: int
    """The activation kept for its gradient that others need too; 0 for none."""
    input: int | None
    """That activation's number: tensors with the same number pay for it once."""


@dataclass(frozen=True)
class Costs:
    """Costs of first-order training, for any choice of tensors.

    Every method takes the names of the tensors that train first-order, and raises ValueError for a
    name that is not among ``tensors``.
    """

    tensors: tuple[TensorCost, ...]
    """By depth, nearest the loss first: the reversed order of first use in the forward."""
    forward_flops: int
    weights_bytes: int
    """Of parameters and buffers."""
    forward_bytes: int
    """The most that an evaluation without gradients has alive beside these."""
    unused: tuple[str, ...] = ()
    """Candidates that the loss does not depend on; they are not in ``tensors``."""
    flops_terms: Mapping[int, int] = field(default_factory=dict, repr=False)
    """FLOPs by the set of depths (bit k: depth k) for which they are due, if one is chosen."""
    kept_terms: Mapping[int, int] = field(default_factory=dict, repr=False)
    """Bytes of kept activations, likewise."""
    step: Step | None = field(default=None, repr=False, compare=False)
    """Repeats the step for :meth:`peak`."""

    def flops(self, chosen: Collection[str]) -> int:
        """FLOPs of the backward, exactly."""
        return due(self.flops_terms, self._set(chosen), len(self.tensors))

    def kept(self, chosen: Collection[str]) -> int:
        """Bytes of activations that the forward keeps for the backward, exactly."""
        return due(self.kept_terms, self._set(chosen), len(self.tensors))

    def bytes(self, chosen: Collection[str], *, in_backward: bool = False) -> int:
        """Bytes of gradients, optimizer state and kept activations.

        Args:
            in_backward: gradients are applied and freed as they come: the largest one counts.
        """
        return self.kept(chosen) + self._stored(self._set(chosen), in_backward)

    def flops_bound(self, chosen: Collection[str]) -> int:
        """The sum of the tensors' shares: at least :meth:`flops`, equal where all train."""
        wanted = self._set(chosen)
        path = sum(t.path_flops for t in self.tensors[: wanted.bit_length()])
        return path + sum(self.tensors[k].weight_flops for k in members(wanted))

    def bytes_bound(self, chosen: Collection[str], *, in_backward: bool = False) -> int:
        """The sum of the tensors' shares: at least :meth:`bytes`, equal where all train."""
        wanted = self._set(chosen)
        picked = [self.tensors[k] for k in members(wanted)]
        inputs = {t.input: t.input_bytes for t in picked if t.input is not None}
        path = sum(t.path_bytes for t in self.tensors[: wanted.bit_length()])
        own = sum(t.own_bytes for t in picked)
        return path + own + sum(inputs.values()) + self._stored(wanted, in_backward)

    def peak(
        self,
        chosen: Collection[str],
        *,
        in_backward: bool = False,
        evaluations: bool = False,
        coupling: bool = False,
    ) -> int:
        """The most bytes alive in one step (forward, backward, update), weights included.

        The step is repeated on the meta device, which takes a fraction of a second for a small
        model and a few seconds for one of hundreds of tensors.

        Args:
            in_backward: gradients are applied and freed as they come.
            evaluations: the loss is evaluated without gradients too, while gradients are held, as
                zeroth-order steps do.
            coupling: the loss is back-propagated once more while gradients are held, and adds to
                them, as with :class:`zofo_optim.HybridZOFO`'s ``coupling``.

        Raises:
            ValueError: the costs were made without a closure.
        """
        if self.step is None:
            raise ValueError("costs must come from costs_of to tell a peak, got hand-made ones")
        wanted = self._set(chosen)
        state = sum(self.tensors[k].state_bytes for k in members(wanted))
        names = [self.tensors[k].name for k in members(wanted)]
        held = 0 if in_backward else sum(self.tensors[k].gradient_bytes for k in members(wanted))
        most = [self.forward_bytes, held + self.step.workspace(names, in_backward)]
        if names:
            most.append(self.step.peaks(names, in_backward).step)
        if names and coupling:
            most.append(held + self.step.peaks(names, again=True).step)
        if evaluations:
            most.append(held + self.forward_bytes)
        return self.weights_bytes + state + max(most)

    def _stored(self, wanted: int, in_backward: bool) -> int:
        picked = [self.tensors[k] for k in members(wanted)]
        gradients = [t.gradient_bytes for t in picked]
        held = max(gradients, default=0) if in_backward else sum(gradients)
        return held + sum(t.state_bytes for t in picked)

    def _set(self, chosen: Collection[str]) -> int:
        if isinstance(chosen, str):
            raise TypeError(f"chosen must be a collection of names, got the string {chosen!r}")
        depths = {t.name: k for k, t in enumerate(self.tensors)}
        for name in chosen:
            if name not in depths:
                why = "which the loss does not depend on" if name in self.unused else "no candidate"
                raise ValueError(f"chosen must be names of tensors with costs, got {name!r}, {why}")
        return union(1 << depths[name] for name in chosen)
