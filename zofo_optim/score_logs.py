"""What a trainer of scores logs: metrics by TRL's names, and the completions themselves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from .completions import Rows
from .rewards import Scored


class _Population(NamedTuple):
    """What was found of the completions of one batch."""

    groups: Sequence[Hashable]
    lengths: Sequence[int]
    complete: Sequence[bool]
    scored: Scored
    reward: np.ndarray
    kl: np.ndarray | None

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """By reward functions' ``names``."""
        of_group: dict[Hashable, list[int]] = {}
        for position, group in enumerate(self.groups):
            of_group.setdefault(group, []).append(position)
        total, each = self.scored
        flat = [len(set(total[some].tolist())) == 1 for some in of_group.values()]
        ended = [length for length, ends in zip(self.lengths, self.complete, strict=True) if ends]
        found: dict[str, float] = {
            "reward": _of_finite(np.mean, total),
            "reward_std": _of_finite(_deviation, total),
            "frac_reward_zero_std": float(np.mean(flat)),
            "completions/clipped_ratio": 1 - float(np.mean(self.complete)),
            "completions/unscored": float((~np.isfinite(self.reward)).sum()),
            **_sizes("length", self.lengths),
            **_sizes("terminated_length", ended),
        }
        for position, name in enumerate(names):
            column = each[:, position]
            found[f"rewards/{name}/mean"] = _of_finite(np.mean, column)
            found[f"rewards/{name}/std"] = _of_finite(_deviation, column)
        if self.kl is not None:
            found["kl"] = _of_finite(np.mean, self.kl)
        return found

    @classmethod
    def joined(cls, parts: Sequence[_Population]) -> _Population:
        """Of those that processes have, each with prompts of its own."""
        kls = [part.kl for part in parts if part.kl is not None]
        return cls(
            [(process, group) for process, part in enumerate(parts) for group in part.groups],
            [*chain.from_iterable(part.lengths for part in parts)],
            [*chain.from_iterable(part.complete for part in parts)],
            Scored(*map(np.concatenate, zip(*(part.scored for part in parts), strict=True))),
            np.concatenate([part.reward for part in parts]),
            np.concatenate(kls) if kls else None,
        )


class ScoreLogs:
    """Gathers what the populations since the last log were, and what the last one wrote.

    Args:
        names: of the reward functions.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.last_reward = 0.0
        """The mean of the last population's finite rewards."""
        self.clear()

    def clear(self) -> None:
        self._populations: list[_Population] = []
        self._told: dict[str, list[float]] = {}
        self._table: dict[str, list[Any]] = {}
        self._extra: dict[str, list[Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._populations)

    def log_metric(self, name: str, value: float) -> None:
        """For reward functions: a number of theirs."""
        self._told.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """For reward functions: a column of the table of completions."""
        self._extra[column] = list(values)

    def add(
        self,
        rows: Rows,
        texts: Sequence[Any],
        lengths: Sequence[int],
        complete: Sequence[bool],
        scored: Scored,
        reward: np.ndarray,
        kl: np.ndarray | None = None,
    ) -> None:
        """A population.

        Args:
            rows: of it.
            texts: its completions.
            lengths: their tokens.
            complete: whether each came to its end.
            scored: what reward functions gave them.
            reward: what the step goes by, shape (B,).
            kl: mean of log p - log p_start over the tokens of each, shape (B,).

        Raises:
            ValueError: ``log_extra`` was given a column of another length.
        """
        self.last_reward = np.nan_to_num(_of_finite(np.mean, reward))
        self._populations.append(
            _Population(rows.groups, lengths, complete, scored, reward, kl),
        )
        self._keep(rows, texts, scored, reward)

    def take_in(
        self,
        gather: Callable[[list[Any]], list[Any]],
        *,
        together: bool,
        texts: bool = False,
    ) -> None:
        """Have what the logs of all processes have; each of them calls this.

        Args:
            gather: makes of each process's list one of all.
            together: whether batches of the same number are one population.
            texts: take in tables too.
        """
        table = self._table if texts else {}
        found = gather([(self._populations, self._told, table)])
        populations, told, tables = zip(*found, strict=True)
        if together:
            self._populations = [*map(_Population.joined, zip(*populations, strict=True))]
        else:
            self._populations = [*chain.from_iterable(populations)]
        self._told = {}
        for name in dict.fromkeys(chain.from_iterable(told)):
            self._told[name] = [*chain.from_iterable(part.get(name, ()) for part in told)]
        if texts:
            self._table = {
                name: [*chain.from_iterable(part[name] for part in tables)]
                for name in tables[0]
                if all(name in part for part in tables)  # a column has a value in each row
            }

    def _keep(self, rows: Rows, texts: Sequence[Any], scored: Scored, reward: np.ndarray) -> None:
        extra, self._extra = self._extra, {}
        for name, values in extra.items():
            if len(values) != len(texts):
                raise ValueError(
                    f"log_extra must be given a value for each of {len(texts)} completions, got "
                    f"{len(values)} for {name!r}"
                )
        self._table = {
            "prompt": list(rows.prompts),
            "completion": list(texts),
            **{name: scored.each[:, i].tolist() for i, name in enumerate(self._names)},
            "total_reward": reward.tolist(),
            **extra,
        }

    def metrics(self) -> dict[str, float]:
        """Of all completions since the last log; what was never finite is left out."""
        pairs: dict[str, list[tuple[float, int]]] = {
            name: [(value, 1) for value in values] for name, values in self._told.items()
        }
        for one in self._populations:
            for name, value in one.metrics(self._names).items():
                pairs.setdefault(name, []).append((value, len(one.groups)))
        found = {}
        for name, of_name in pairs.items():
            known = [(value, weight) for value, weight in of_name if np.isfinite(value)]
            if not known:
                continue
            values, weights = zip(*known, strict=True)
            if name.startswith("completions/min"):
                found[name] = min(values)
            elif name.startswith("completions/max"):
                found[name] = max(values)
            else:
                found[name] = float(np.average(values, weights=weights))
        return found

    def table(self, step: int) -> Any:
        """The last population's completions, as a ``datasets.Dataset``."""
        from datasets import Dataset

        return Dataset.from_dict({"step": [step] * len(self._table["prompt"]), **self._table})

    def show(self, step: int, count: int | None) -> None:
        """Print the first completions of the table."""
        from rich.console import Console
        from rich.table import Table

        drawn = Table(title=f"Step {step}", show_lines=True)
        for name in self._table:
            drawn.add_column(name)
        for row in list(zip(*self._table.values(), strict=True))[:count]:
            drawn.add_row(*(_cell(value) for value in row))
        Console().print(drawn)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):  # messages
        value = "\n".join(f"{message['role']}: {message['content']}" for message in value)
    return escape(str(value))


def _sizes(name: str, lengths: Sequence[int]) -> dict[str, float]:
    known = np.asarray(lengths, dtype=np.float64) if lengths else np.full(1, np.nan)
    parts = {"mean": known.mean(), "min": known.min(), "max": known.max()}
    return {f"completions/{part}_{name}": float(value) for part, value in parts.items()}


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _of_finite(of: Any, values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(of(finite)) if len(finite) else np.nan
