"""A policy's choice within a budget, and what the least budget is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from .budgets import parse_budget, shown
from .policies import POLICIES, Problem

_SEARCH = 10
"""Halvings by which the bytes are found that a peak leaves: to a thousandth of full training's."""


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
        f"budget must leave room for one tensor at least, got {budget!r}, which is "
        f"{shown(limit, unit)} of {shown(whole, unit)}; the least is "
        f"{shown(problem.spent(least), unit)} ({problem.spent(least) / whole:.2%}), for "
        f"{least[0]!r}"
    )


def _within_peak(problem: Problem, policy: str, budget: Any, peak: int) -> list[str]:
    """By halves: a choice's peak is known once it is made."""
    choose = POLICIES[policy].choose
    high = problem.spent(problem.names)
    chosen = choose(replace(problem, limit=high))
    if chosen and peak_of(problem, chosen) <= peak:
        return chosen
    least = min(_begins(problem, policy), key=problem.spent)
    low = problem.spent(least)
    found = choose(replace(problem, limit=low))
    if not found or peak_of(problem, found) > peak:
        needed = peak_of(problem, least)
        raise ValueError(
            f"budget must leave room for the weights and one tensor at least, got {budget!r}; the "
            f"least is {shown(needed, 'B')} ({needed} bytes), for {least[0]!r}; weights alone are "
            f"{shown(problem.costs.weights_bytes, 'B')}"
        )
    for _ in range(_SEARCH):
        limit = (low + high) // 2
        chosen = choose(replace(problem, limit=limit))
        if peak_of(problem, chosen) <= peak:
            found, low = chosen, limit
        else:
            high = limit
    return found


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
    return problem.costs.peak(chosen, in_backward=problem.in_backward, evaluations=True)
