"""What a rule remembers of each zeroth-order group, from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .capture import capturing
from .rules import Rule, State, widest


class RuleStates:
    """One state a ZO group, by its place, on the device of its coefficients.

    States change where an update has been applied, and in place, so that a captured graph goes on
    with them. Copies of an optimizer's dictionary share this object.

    Args:
        rule: of all groups.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._kept: list[dict[str, Any]] = []  # numbers, until they are first needed on a device

    def shaped(self, rows: Sequence[Tensor]) -> tuple[list[Tensor], list[State]]:
        """Coefficients after the rule, and what to :meth:`keep` once they are applied.

        Args:
            rows: of each ZO group in order, shape (samples,).

        Raises:
            ValueError: the rule needs more samples, or is not as :class:`Rule` says.
            RuntimeError: the states would be made while a graph is captured.
        """
        found = [self._shaped(position, row) for position, row in enumerate(rows)]
        return [coefficients for coefficients, _ in found], [state for _, state in found]

    def _shaped(self, position: int, coefficients: Tensor) -> tuple[Tensor, State]:
        if coefficients.numel() < self._rule.min_samples:
            raise ValueError(
                f"zo_rule {self._rule!r} compares the samples of a step and must have at least "
                f"{self._rule.min_samples}, got {coefficients.numel()}"
            )
        state = self._there(position, coefficients.device)
        found, after = self._rule.update(coefficients, state)
        # now, as it must not come to light once weights are changing
        if (found.shape, found.dtype) != (coefficients.shape, coefficients.dtype):
            raise ValueError(
                f"zo_rule {self._rule!r} must keep the coefficients' shape and dtype, got "
                f"{tuple(found.shape)} and {found.dtype} for {tuple(coefficients.shape)} and "
                f"{coefficients.dtype}"
            )
        scalars = [name for name, value in after.items() if value.dim() == 0]
        if sorted(scalars) != sorted(state) or len(scalars) != len(after):
            raise ValueError(
                f"zo_rule {self._rule!r} must return 0-dim tensors of the names of its init(), "
                f"{list(state)}, got {list(after)}"
            )
        return found, after

    def _there(self, position: int, device: torch.device) -> State:
        """The state of the group at ``position``, on the device, to be written in place later."""
        self._kept += [self._rule.init() for _ in range(len(self._kept), position + 1)]
        kept = self._kept[position]
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.device == device:
                continue
            if capturing():
                raise RuntimeError(
                    "run a few steps before capturing one in a CUDA graph, as for any "
                    "optimizer: the state of zo_rule is made in the first"
                )
            if isinstance(value, Tensor):
                kept[name] = value.to(device, widest(device))
            else:  # unlike torch.tensor, this waits for no device
                kept[name] = torch.full((), value, dtype=widest(device), device=device)
        return dict(kept)

    def keep(self, states: Sequence[State]) -> None:
        """The update was applied: go on from these states, of the first groups in order."""
        for kept, state in zip(self._kept, states, strict=False):
            for name, value in kept.items():
                value.copy_(state[name])

    def begin(self, position: int) -> None:
        """A group is new at this place, the last one."""
        del self._kept[position:]

    # ---- saving -------------------------------------------------------------------------------

    def saved(self, position: int) -> dict[str, Any] | None:
        """Of one group, in plain numbers, exact; None where the rule remembers nothing.

        Waits for the device.
        """
        init = self._rule.init()
        if not init:
            return None
        kept = self._kept[position] if position < len(self._kept) else init
        numbers = {name: float(value) for name, value in kept.items()}
        return {"rule": type(self._rule).__name__, **numbers}

    def load(self, saved: Sequence[Mapping[str, Any] | None]) -> bool:
        """The inverse of :meth:`saved`, for all groups; tensors stay the same.

        Returns:
            Whether some group had no state of this rule, and begins anew.
        """
        init, name, anew = self._rule.init(), type(self._rule).__name__, False
        del self._kept[len(saved) :]
        self._kept += [self._rule.init() for _ in range(len(self._kept), len(saved))]
        for kept, state in zip(self._kept, saved, strict=True):
            values = dict(state or {})
            fits = values.pop("rule", None) == name and values.keys() == init.keys()
            values = values if fits else init
            anew = anew or bool(init and not fits)
            for key, value in kept.items():
                if isinstance(value, Tensor):
                    value.fill_(values[key])
                else:
                    kept[key] = values[key]
        return anew
