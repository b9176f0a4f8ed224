"""A partition of a model's tensors into first- and zeroth-order ones, as data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..buffers import ParamGroups
from ..freezing import freeze
from ..groups import check_module, options_of, param_groups, split_of
from ..groups_and_state import GroupsAndState
from ..regroup import regroup
from ..zeroth_order import ZerothOrder
from . import files, places, plots, table
from .candidates import remember

MODES = ("fo", "zo", "frozen")


@dataclass(frozen=True)
class Row:
    """One tensor of a :class:`Partition`."""

    name: str
    shape: tuple[int, ...]
    mode: str
    """"fo", "zo", or "frozen": it stays as it is, and takes no gradient."""
    importance: float | None
    """The decrease of the loss that its first step brings, over the largest; None: not asked."""
    gradient_norm: float | None
    flops: int
    """Of its gradient, and of passing the error on to it from the tensors nearer the loss."""
    bytes: int
    """Gradient, optimizer state and activations, likewise."""
    why: str = ""
    """Of frozen ones: why."""
    candidate: bool = True
    """False: it required gradients, and is zeroth-order or frozen whatever the budget is."""


@dataclass(frozen=True)
class Partition:
    """Which tensors of a model train first-order, which zeroth-order, and what that costs.

    Made by :func:`importance_partition`. ``str()`` is a table of at most 100 columns.

    Example:
        >>> partition.save("partition.json")
        >>> groups = Partition.load("partition.json").groups(
        ...     model, zo=dict(lr=1e-6), fo=dict(lr=1e-3)
        ... )
    """

    rows: tuple[Row, ...]
    """Nearest the loss first. Frozen parameters of the model that were no candidates have none."""
    policy: str
    of: str
    """What the budget limits: "flops" or "memory"."""
    budget: float | int | str
    """As it was given."""
    flops: int
    """Of the backward of a batch."""
    full_flops: int
    """The same, were all candidates first-order."""
    forward_flops: int
    bytes: int
    """Gradients, optimizer state and kept activations."""
    full_bytes: int
    peak: int | None
    """The most bytes alive in a step, weights included, where the budget is of memory."""
    in_backward: bool = False
    """Whether gradients are applied and freed as they come."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    directions: str = "shared"

    @property
    def first_order(self) -> tuple[str, ...]:
        """Names, nearest the loss first."""
        return tuple(row.name for row in self.rows if row.mode == "fo")

    @property
    def zeroth_order(self) -> tuple[str, ...]:
        """Names, likewise; not of what required no gradients before, where something did."""
        return tuple(row.name for row in self.rows if row.mode == "zo")

    def __str__(self) -> str:
        return table.of(self)

    def summary(self) -> str:
        """What the table ends with: how many tensors, and what they cost."""
        return table.summary(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        files.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Partition:
        """What :meth:`save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it holds no partition.
        """
        return files.load(path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw importance and cost by depth; the ending of ``path`` says the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        plots.draw(self, path)

    def groups(
        self,
        model: nn.Module,
        zo: Mapping[str, Any] | None = None,
        fo: Mapping[str, Any] | None = None,
        *,
        verbose: bool = True,
    ) -> ParamGroups:
        """Parameter groups for :class:`zofo_optim.HybridZOFO`, as of ``hybrid_param_groups``.

        Frozen parameters that were no candidates are zeroth-order by the rules of
        ``hybrid_param_groups`` and the patterns that the partition was made with. First-order
        tensors are made to require gradients; what is in no group is made not to, and loses its
        gradient, so that a step takes what was predicted. ``requires_grad`` of zeroth-order tensors
        is left alone, as HybridZOFO's steps turn it off. The model's next partition has the
        same candidates, unless ``requires_grad`` is set meanwhile.

        Args:
            model: with the partition's tensors.
            zo: options of the ZO group.
            fo: options of the FO group.
            verbose: print a one-line summary.

        Returns:
            Plain dictionaries with ``params``, ``param_names``, ``mode`` and the given options,
            ZO first; a group without parameters is left out.

        Raises:
            TypeError: ``model`` is no module, or options are no mapping.
            ValueError: the model lacks a tensor, has one of another shape, or trains one that the
                partition does not know; or as ``hybrid_param_groups``.
        """
        check_module(model)
        options = {"zo": options_of("zo", zo), "fo": options_of("fo", fo)}
        rows = places.rows_of(self, model)
        rules = ZerothOrder(model, self.include, self.exclude, self.directions)

        def mode_of(names: Any, parameter: Tensor) -> str:
            row = rows.get(id(parameter))
            if row is None:
                return "zo"
            rules.reach(names)
            if row.mode != "zo":
                rules.know(names)
            return row.why or "frozen" if row.mode == "frozen" else row.mode

        split = split_of(model, mode_of, rules)
        split = split._replace(
            zo=places.in_order(self, split.zo), fo=places.in_order(self, split.fo)
        )
        groups = param_groups(model, split, options, "partition" if verbose else None)
        for p in split.fo.values():
            p.requires_grad_(True)
        freeze(chain.from_iterable(split.left_out.values()))
        remember(rows, model.parameters())
        return groups

    def apply(
        self,
        optimizer: GroupsAndState,
        model: nn.Module | None = None,
        *,
        place: Callable[[str, Tensor, str], int] | None = None,
    ) -> None:
        """Move tensors between the groups of an optimizer that is in use, between two steps.

        The groups stay, so that schedulers go on; a tensor that stays first-order keeps its state,
        one that becomes so starts afresh. Directions follow the places of the zeroth-order tensors,
        so a journal must be closed before, and another one begun.

        A tensor that becomes frozen is then in a first-order group, where it requires no gradient
        and has none, but keeps its state: so ``save_hybrid``, state dicts and checkpoints have it.
        To load such a state, construct the optimizer by the first partition's groups, and apply the
        later ones.

        Args:
            optimizer: made from groups with names.
            model: the one that ``optimizer`` trains; needed where a tensor is to train that is in
                no group yet.
            place: told a tensor's name, the tensor and its mode; gives the position of the group
                that it goes to. Needed where several groups have this mode; asked only for
                tensors that change; of those that become frozen "fo".

        Raises:
            TypeError: ``optimizer`` is no HybridZOFO.
            ValueError: it lacks names, tensors or a group, several groups have the mode, a shape is
                another, it has first-order tensors that the partition does not know, or
                ``fo_optimizer`` does not take one; ``model`` is another one, or does not fit, as
                for :meth:`groups`. Nothing has changed.
            RuntimeError: a closure runs, an estimate waits for its step, or a journal is attached.
        """
        result = places.moved(self, optimizer, model, place)
        inside = [p for members in result.members for _, p in members]
        ids = {id(p) for p in inside}
        regroup(optimizer, result.members, [p for p in result.frozen if id(p) in ids])
        freeze(result.frozen)
        remember(result.rows, inside if model is None else model.parameters())
