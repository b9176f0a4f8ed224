"""A policy's choice within a budget, and what the least budget is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from .budgets import parse_budget, shown
from .policies import POLICIES, Problem, filled

_SEARCH = 10
"""Halvings by which the bytes are found that a peak leaves: to a thousandth of full training's."""
_REPLAYS = 32
"""How many peaks are found out to fill what the search left; of large models each takes seconds."""


def chosen_within(problem: Problem, policy: str, budget: Any) -> list[str]:
    """What the policy picks within the budget.

    Raises:
        ValueError: nothing.
    """
    parsed = parse_budget(budget, problem.of)
    choose = POLICIES[policy].choose
    whole = problem.spent(problem.names)
    if parsed.peak is not None:
        return _within_peak(problem, policy, budget, parsed.peak)
    assert parsed.share is not None
    problem = replace(problem, limit=int(parsed.share * whole))
    if chosen := choose(problem):
        return chosen
    least = min(_begins(problem, policy), key=problem.spent)
    limit, unit = problem.limit, "FLOPs" if problem.of == "flops" else "B"
    raise ValueError(
        f"budget must leave room for the least that policy {policy!r} takes, got {budget!r}, "
        f"which is {shown(limit, unit)} of {shown(whole, unit)}; the least is "
        f"{shown(problem.spent(least), unit)} ({problem.spent(least) / whole:.2%}), for "
        f"{least[0]!r}"
    )


def _within_peak(problem: Problem, policy: str, budget: Any, peak: int) -> list[str]:
    """By halves, as a choice's peak is known once it is made; then what still fits is added.

    A set of more bytes may have a lower peak, so the most valuable that fits is kept, that of the
    policy's order among them; where none is found, the set of the least peak serves.
    """
    choose = POLICIES[policy].choose
    begins = _begins(problem, policy)
    low, high = min(map(problem.spent, begins)), problem.spent(problem.names)
    found = choose(replace(problem, limit=high))
    if found and peak_of(problem, found) <= peak:
        return found
    values = POLICIES[policy].values(problem)

    def worth(chosen: Collection[str]) -> float:
        return sum(values[name] for name in chosen)

    found = []
    for _ in range(_SEARCH):
        limit = (low + high) // 2
        chosen = choose(replace(problem, limit=limit))
        if chosen and _fits(problem, chosen, peak):
            found, low = max(found, chosen, key=worth), limit
        elif chosen:
            high = limit
        else:
            low = limit
    found = max(*(_filled(problem, policy, begun, peak) for begun in (found, [])), key=worth)
    if not found:
        least, needed = _least(problem, begins)
        if needed > peak:
            raise ValueError(
                f"budget must leave room for the weights and one tensor at least, got {budget!r}; "
                f"the least is {shown(needed, 'B')} ({needed} bytes), for {least[0]!r}; weights "
                f"alone are {shown(problem.costs.weights_bytes, 'B')}"
            )
        found = _filled(problem, policy, least, peak)
    return found


def _filled(problem: Problem, policy: str, chosen: Collection[str], peak: int) -> list[str]:
    """With what still fits under the peak, in the policy's order, as far as replays reach."""
    left = _REPLAYS

    def fits(names: Collection[str]) -> bool:
        nonlocal left
        if _floor(problem, names) > peak or not left:
            return False
        left -= 1
        return peak_of(problem, names) <= peak

    parts, stop = POLICIES[policy].order(problem)
    return filled(problem.names, parts, chosen, fits, stop=stop)


def _least(problem: Problem, begins: Collection[list[str]]) -> tuple[list[str], int]:
    """The set of the least peak, and this."""
    best: tuple[list[str], int] | None = None
    for chosen in sorted(begins, key=lambda names: _floor(problem, names)):
        if best is not None and _floor(problem, chosen) >= best[1]:
            break
        if best is None or peak_of(problem, chosen) < best[1]:
            best = chosen, peak_of(problem, chosen)
    assert best is not None
    return best


def _fits(problem: Problem, chosen: Collection[str], peak: int) -> bool:
    return _floor(problem, chosen) <= peak and peak_of(problem, chosen) <= peak


def _floor(problem: Problem, chosen: Collection[str]) -> int:
    """At most the peak, and known at once: what is kept, and what evaluations take."""
    costs = problem.costs
    kept = costs.kept(chosen)
    stored = costs.bytes(chosen, in_backward=problem.in_backward) - kept
    state = sum(t.state_bytes for t in costs.tensors if t.name in set(chosen))
    held = 0 if problem.in_backward else stored - state
    beside = max(costs.forward_bytes, kept if problem.coupling else 0)
    return costs.weights_bytes + state + max(kept, held + beside)


def _begins(problem: Problem, policy: str) -> list[list[str]]:
    """The least sets that the policy may choose.

    Raises:
        ValueError: it may choose none, whatever the budget is.
    """
    found = [list(names) for names in POLICIES[policy].begins(problem)]
    if not found:
        raise ValueError(
            f"policy {policy!r} must have a candidate whose first step decreases the loss, got none"
        )
    return found


def peak_of(problem: Problem, chosen: Collection[str]) -> int:
    """Of a step of HybridZOFO."""
    return problem.costs.peak(
        chosen, in_backward=problem.in_backward, evaluations=True, coupling=problem.coupling
    )
