"""Scores of completions: reward functions as TRL calls them, and shapes of scores."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RewardFunction = Callable[..., Sequence["float | None"]]
"""Of prompts, completions and a data set's columns, by name; gives a number for each completion.

None where it does not apply to a completion."""
SHAPES = ("zscore", "centered_rank")
_ROUNDING = 8 * float(np.finfo(np.float64).eps)
"""Relative to the largest score: sums of a few weighted rewards."""


def shape_scores(
    scores: Sequence[float] | np.ndarray,
    shape: str = "zscore",
    *,
    groups: Sequence[Hashable] | None = None,
) -> np.ndarray:
    """Scores on a scale of their own, for a closure to return; over all, or in each group.

    Zeroth order weighs directions by differences of scores. Where prompts are of different
    difficulty, or scores have outliers, it should not see them as they are.

    Args:
        scores: shape (B,). Those that are not finite stay, and count nowhere.
        shape: "zscore": (score - mean) / standard deviation. "centered_rank": ranks, equal
            ones shared, from -1/2 to 1/2 (Salimans et al. 2017, section 2.1).
        groups: what a score's group is, such as its prompt, shape (B,); None: one group.

    Returns:
        Shape (B,), float64; 0 in groups without spread.

    Raises:
        ValueError: ``shape`` is none of these, or ``groups`` are not as many as ``scores``.

    Example:
        >>> shape_scores([1.0, 3.0, 0.0, 0.0], groups=["a", "a", "b", "b"]).tolist()
        [-1.0, 1.0, 0.0, 0.0]
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")
    raw = without_rounding(np.asarray(scores, dtype=np.float64))
    if groups is None:
        groups = [0] * len(raw)
    if len(groups) != len(raw):
        raise ValueError(f"groups must be as many as scores, {len(raw)}, got {len(groups)}")
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        if math.isfinite(raw[position]):
            members.setdefault(group, []).append(position)
    shaped: np.ndarray = raw.copy()
    for positions in members.values():
        some = raw[positions]
        shaped[positions] = _zscores(some) if shape == "zscore" else _centered_ranks(some)
    return shaped


def without_rounding(scores: np.ndarray) -> np.ndarray:
    """Scores of which those that sums may have rounded apart are equal, shape (B,).

    A rule that makes the size of differences one would take rounding for a message.
    """
    if scores.ndim != 1:
        raise ValueError(f"scores must be numbers, shape (B,), got shape {scores.shape}")
    found: np.ndarray = scores.copy()
    finite = np.flatnonzero(np.isfinite(scores))
    if len(finite):
        order = finite[scores[finite].argsort(kind="stable")]
        values = scores[order]
        room = _ROUNDING * np.abs(values).max()
        begins = np.concatenate([[True], np.diff(values) > room])
        found[order] = values[begins][begins.cumsum() - 1]
    return found


def _zscores(scores: np.ndarray) -> np.ndarray:
    if (scores == scores[0]).all():  # their mean may round
        return np.zeros_like(scores)
    centered: np.ndarray = scores - scores.mean()
    centered /= centered.std()
    return centered


def _centered_ranks(scores: np.ndarray) -> np.ndarray:
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    if len(values) == 1:
        return np.zeros_like(scores)
    last = counts.cumsum() - 1
    ranks: np.ndarray = (last - (counts - 1) / 2)[inverse]
    ranks /= len(scores) - 1
    ranks -= 0.5
    return ranks


class Scored(NamedTuple):
    """What reward functions gave B completions."""

    total: np.ndarray
    """The weighted sum over functions, shape (B,); NaN where none applied."""
    each: np.ndarray
    """Shape (B, functions); NaN where one did not apply."""


class RewardFunctions:
    """Several reward functions as one score.

    They are called by name, as TRL's GRPOTrainer does: ``prompts``, ``completions``,
    ``completion_ids`` and the data set's other columns, lists of the same length. A function gets
    what its signature asks for, all where it takes ``**kwargs``.

    Args:
        functions: one or several.
        weights: of each in the sum; default 1.

    Raises:
        TypeError: one cannot be called, or is a coroutine or a module.
        ValueError: there is none, or as many weights as functions are not given.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
    ) -> None:
        several = isinstance(functions, Sequence) and not isinstance(functions, str)
        self._functions: list[RewardFunction] = [*functions] if several else [functions]  # type: ignore[list-item, misc]
        if not self._functions:
            raise ValueError("reward_funcs must have at least one function, got none")
        for function in self._functions:
            _check(function)
        self.names = _names(self._functions)
        """Of the functions, in order; numbered where several have the same."""
        self._weights = [1.0] * len(self._functions) if weights is None else [*weights]
        if len(self._weights) != len(self._functions):
            raise ValueError(
                f"reward_weights must be as many as reward_funcs, {len(self._functions)}, got "
                f"{len(self._weights)}"
            )

    def __call__(self, completions: Sequence[Any], **columns: Any) -> Scored:
        """Score the completions.

        Args:
            completions: texts, or lists of messages.
            **columns: lists of the same length, and single values for all of them.

        Raises:
            RuntimeError: a function raised; says which, and for which completion, by calling it for
                parts of them again.
            ValueError, TypeError: it gave not as many numbers as there are completions.
        """
        each = np.empty((len(completions), len(self._functions)))
        for position, (function, name) in enumerate(zip(self._functions, self.names, strict=True)):
            wanted = _wanted(function, {"completions": completions, **columns})
            try:
                found = function(**wanted)
            except Exception as error:
                raise _blamed(function, name, wanted, len(completions), error) from error
            each[:, position] = _numbers(found, name, len(completions))
        applies = ~np.isnan(each)
        total = np.where(applies, each, 0.0) @ np.asarray(self._weights)
        return Scored(without_rounding(np.where(applies.any(1), total, np.nan)), each)


def _check(function: Any) -> None:
    plain = getattr(function, "func", function)  # of a partial
    if any(map(inspect.iscoroutinefunction, (plain, getattr(plain, "__call__", None)))):  # noqa: B004
        raise TypeError(
            f"reward_funcs must be plain functions, got the coroutine {_name(function)!r}: run it "
            "within one, by asyncio.run"
        )
    if not callable(function) or hasattr(function, "named_parameters"):
        raise TypeError(
            "reward_funcs must be functions of completions that return a list of numbers, got "
            f"{function!r:.200}; call a reward model within one"
        )


def _name(function: Any) -> str:
    plain = getattr(function, "func", function)
    return str(getattr(plain, "__name__", type(plain).__name__))


def _names(functions: Sequence[Any]) -> list[str]:
    plain = [_name(f) for f in functions]
    return [
        name if plain.count(name) == 1 else f"{name}_{plain[: i + 1].count(name)}"
        for i, name in enumerate(plain)
    ]


def _wanted(function: RewardFunction, columns: Mapping[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built in
        return dict(columns)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(columns)
    names = {p.name for p in parameters}
    needed = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
    if missing := sorted(needed - columns.keys()):
        raise TypeError(
            f"reward function {_name(function)!r} must ask for {sorted(columns)} by name, got "
            f"{missing}"
        )
    return {name: column for name, column in columns.items() if name in names}


def _numbers(found: Any, name: str, count: int) -> list[float]:
    numbers: list[float] = []
    value = found
    try:
        for value in found:
            numbers.append(math.nan if value is None else float(value))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"reward function {name!r} must return a list of numbers, got {value!r:.200}"
        ) from error
    if len(numbers) != count:
        raise ValueError(
            f"reward function {name!r} must return a number for each of {count} completions, got "
            f"{len(numbers)}"
        )
    return numbers


def _blamed(
    function: RewardFunction, name: str, columns: Mapping[str, Any], count: int, error: Exception
) -> RuntimeError:
    """Says which completion made the function raise; asks again for halves of them."""

    def fails(rows: range) -> bool:
        part = {
            key: [value[i] for i in rows]
            if isinstance(value, list) and len(value) == count
            else value
            for key, value in columns.items()
        }
        try:
            function(**part)
        except Exception:
            return True
        return False

    rows = range(count)
    while len(rows) > 1:
        middle = (rows.start + rows.stop) // 2
        halves = range(rows.start, middle), range(middle, rows.stop)
        found = next(filter(fails, halves), None)
        if found is None:
            break
        rows = found
    if len(rows) == 1:
        completion = columns.get("completions", [None] * count)[rows.start]
        where = f"for completion {rows.start}, {completion!r:.200}"
    else:
        where = f"for completions {rows.start} to {rows.stop - 1} together, not for half of them"
    return RuntimeError(f"reward function {name!r} raised {type(error).__name__}: {error}; {where}")
