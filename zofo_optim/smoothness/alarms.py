"""Warnings of a run that is, or soon will be, unstable."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import caller_level
from ..groups_and_state import GroupsAndState
from .snapshot import Rate

AT_ONCE = 4.0
"""A rate so many times its limit is warned of by one measurement."""
GROWN = 10.0
"""A loss so many times the first one is that of a run that diverges."""
_SAID = {"fo": "first-order", "zo": "zeroth-order"}


class Alarms:
    """See :class:`SmoothnessRecorder`, whose arguments they are."""

    def __init__(self, optimizer: GroupsAndState, margin: float, patience: int) -> None:
        self._optimizer = optimizer
        self._margin, self._patience = margin, patience
        self._beyond: dict[int, int] = {}  # measurements in a row, by group
        self._warned: set[int] = set()
        self._has_diverged = False

    def clear(self) -> None:
        """Count measurements in a row anew."""
        self._beyond.clear()

    def look(self, rows: Sequence[Mapping[str, Any]], rates: Sequence[Rate]) -> None:
        """At the last row."""
        for rate in rates:
            self._look_at_rate(rate, rows[-1]["step"])
        self._look_at_loss(rows)

    def _look_at_rate(self, of: Rate, step: int) -> None:
        if of.limit is None:  # not known, which says nothing about those around it
            return
        above = of.rate > (1 + self._margin) * of.limit
        count = self._beyond[of.group] = self._beyond.get(of.group, 0) + 1 if above else 0
        at_once = above and of.rate > AT_ONCE * of.limit
        if of.group in self._warned or not (at_once or count >= self._patience):
            return
        self._warned.add(of.group)
        mode = _SAID[self._optimizer.param_groups[of.group]["mode"]]
        often = (
            f"{of.rate / of.limit:.1f} times as much"
            if at_once
            else f"{count} measurements in a row above by more than {self._margin:.0%}"
        )
        warnings.warn(
            f"the learning rate of group {of.group} ({mode}), {of.rate:.2e}, is above "
            f"{of.limit:.2e}, up to which steps are stable at the curvature of this batch "
            f"(step {step}, {often}): the loss may grow; lower the rate",
            stacklevel=caller_level(),
        )

    def _look_at_loss(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._has_diverged:
            return
        loss, first, said = rows[-1]["loss"], rows[0]["loss"], None
        if loss is None:
            said = "is not finite"
        elif first is not None and loss > GROWN * first > 0 and not self._ascends():
            said = f"is {loss:.3g}, {loss / first:.1f} times that of the first row, {first:.3g}"
        if said is not None:
            self._has_diverged = True
            warnings.warn(
                f"the loss at step {rows[-1]['step']} {said}: the run diverges; lower the rates",
                stacklevel=caller_level(),
            )

    def _ascends(self) -> bool:
        return any(group["maximize"] for group in self._optimizer.param_groups)
