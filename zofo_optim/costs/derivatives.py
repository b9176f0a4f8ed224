"""What the backward of an operation costs, and what its forward keeps for it.

Autograd is asked: each operation of a trace runs alone on the meta device, once for every set of
tensors that it is to be differentiated by. Operations of equal shapes are asked once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zofo_kernels._torch_compat import tree_leaves, tree_unflatten

from .flops import FURTHER
from .recorded import Op, Ref, Trace, Value

_MOST = 6
"""Differentiated tensors of one operation, above which its FLOPs are not told apart."""


Terms = tuple[tuple[frozenset[int], int], ...]
"""Amounts, each due as soon as one of its places wants its gradient."""


class Derivative(NamedTuple):
    """Of one operation, by places: the differentiated tensors among its own, in their order."""

    flops: Terms
    kept: tuple[tuple[str, int, Terms], ...]
    """What is kept: ("input" or "output", its position) or ("more", bytes), and how many times for
    which places' gradients: a term of 1 for most."""


def empty(value: Value) -> Tensor:
    """A tensor on meta, of this shape, these strides and this dtype."""
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")


def call(op: Op, tensors: Mapping[int, Tensor]) -> list[Any]:
    """Run an operation on meta tensors, by their numbers; returns its results, flattened."""
    leaves = [_argument(leaf, tensors) for leaf in op.leaves]
    args, kwargs = tree_unflatten(leaves, op.spec)
    return tree_leaves(op.func(*args, **kwargs))


def _argument(leaf: Any, tensors: Mapping[int, Tensor]) -> Any:
    if isinstance(leaf, Ref):
        return tensors[int(leaf)]
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    return None if isinstance(leaf, torch.Generator) else leaf


class Derivatives:
    """Asks autograd about the operations of a trace, and remembers the answers."""

    def __init__(self, recorded: Trace) -> None:
        self._trace = recorded
        self._known: dict[Any, Derivative | None] = {}

    def of(self, op: Op) -> Derivative | None:
        """None where it cannot run on meta, as where the data decide on a shape.

        A product that cannot is taken for one of matrices: the gradient of an operand costs what
        the forward did, and needs the others.
        """
        numbers = inputs_of(op)
        places = tuple(k for k, n in enumerate(numbers) if n in op.masks)
        values = [self._trace.values[n]._replace(storage=0) for n in numbers]
        local = {n: k for k, n in enumerate(numbers)}
        rest = [("tensor", local[int(x)]) if isinstance(x, Ref) else repr(x) for x in op.leaves]
        key = (op.func, str(op.spec), tuple(values), places, tuple(rest))
        if key not in self._known:
            self._known[key] = _ask(op, numbers, values, places) or _product(op, values, places)
        return self._known[key]


def inputs_of(op: Op) -> list[int]:
    """Numbers of the tensors among an operation's arguments, each once."""
    return list(dict.fromkeys(int(leaf) for leaf in op.leaves if isinstance(leaf, Ref)))


class _Answer(NamedTuple):
    flops: int
    kept: frozenset[tuple[str, int, int]]
    """As in :class:`Derivative`, and a count of those that are alike."""


def _ask(
    op: Op, numbers: Sequence[int], values: Sequence[Value], places: tuple[int, ...]
) -> Derivative | None:
    def answer(wanted: Sequence[int]) -> _Answer:
        return _run(op, numbers, values, frozenset(wanted))

    everything = frozenset(places)
    try:
        together = answer(places)
        answers = {frozenset([place]): answer([place]) for place in places}
        every = len(places) <= _MOST and (together.flops or not hasattr(op.func, "_schema"))
        if every:
            answers = {frozenset(s): answer(s) for s in _subsets(places)}
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    kept = []
    for what in sorted(together.kept.union(*(a.kept for a in answers.values()))):
        wanting = frozenset(p for p in places if what in answers[frozenset([p])].kept) or everything
        terms: Terms = ((wanting, 1),)
        if any((what in a.kept) != bool(s & wanting) for s, a in answers.items()):
            terms = _terms(places, {s: int(what in a.kept) for s, a in answers.items()})
        kept.append((what[0], what[1], terms))
    if not every:
        return Derivative(((everything, together.flops),) * bool(together.flops), tuple(kept))
    return Derivative(_terms(places, {s: a.flops for s, a in answers.items()}), tuple(kept))


def _product(op: Op, values: Sequence[Value], places: tuple[int, ...]) -> Derivative | None:
    factors = [place for place, value in enumerate(values) if len(value.shape) > 1]
    wanting = [place for place in places if place in factors]
    if not op.flops:
        return None
    others = {k: frozenset(wanting) - {k} for k in factors}
    return Derivative(
        tuple((frozenset([place]), op.flops) for place in wanting),
        tuple(("input", place, ((needing, 1),)) for place, needing in others.items() if needing),
    )


def _subsets(places: Sequence[int]) -> list[tuple[int, ...]]:
    sizes = range(len(places) + 1)
    return [chosen for size in sizes for chosen in combinations(places, size)]


def _terms(places: Sequence[int], amounts: Mapping[frozenset[int], int]) -> Terms:
    """The one way to write a function of sets f as the sum of a(T) over all T that meet the set.

    What T and its subsets alone are due for is f(all) - f(all without T); inclusion and exclusion
    gives a(T). Matrix products have terms for one place each; fused attention has one for all.
    Negative ones are of operations that cost less when more is wanted: attention is taken apart
    where its mask learns, and the fused kernel computes again what the parts keep.
    """
    everything = frozenset(places)
    found = {}
    for chosen in map(frozenset, _subsets(places)):
        total = 0
        for part in map(frozenset, _subsets(sorted(chosen))):
            sign = -1 if (len(chosen) - len(part)) % 2 else 1
            total += sign * (amounts[everything] - amounts[everything - part])
        found[chosen] = total
    return tuple((chosen, total) for chosen, total in found.items() if total)


def _run(
    op: Op, numbers: Sequence[int], values: Sequence[Value], wanted: frozenset[int]
) -> _Answer:
    """Forward and backward on meta, differentiated by the tensors at the places wanted."""
    if not wanted:
        return _Answer(0, frozenset())
    given = [empty(value) for value in values]
    leaves = {k: given[k].requires_grad_() for k in sorted(wanted)}
    if hasattr(op.func, "_schema") and op.func._schema.is_mutable:  # leaves must not be written
        given = [t.clone() if k in wanted else t for k, t in enumerate(given)]
    packed: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.untyped_storage())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        results = call(op, dict(zip(numbers, given, strict=True)))
    known: dict[int, tuple[str, int]] = {}
    for k, out in enumerate(results):
        if isinstance(out, Tensor):
            known[id(out.untyped_storage())] = ("output", k)
    for k, t in enumerate(given):
        known[id(t.untyped_storage())] = ("input", k)
    kept: set[tuple[str, int, int]] = set()
    for storage in {id(s): s for s in packed}.values():
        if id(storage) in known:
            kept.add((*known[id(storage)], 0))
        else:
            size = storage.nbytes()
            kept.add(("more", size, sum(what[:2] == ("more", size) for what in kept)))
    outputs = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
    with FlopCounterMode(display=False, custom_mapping=dict(FURTHER)) as counter:
        errors = [torch.empty_like(t) for t in outputs]
        torch.autograd.grad(outputs, list(leaves.values()), errors, allow_unused=True)
    return _Answer(counter.get_total_flops(), frozenset(kept))
