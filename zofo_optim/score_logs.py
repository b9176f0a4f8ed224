"""What a trainer of scores logs: metrics by TRL's names, and the completions themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .completions import Rows, Writer
from .rewards import Scored


class ScoreLogs:
    """Gathers what the populations since the last log were, and what the last one wrote.

    Args:
        names: of the reward functions.
        writer: of the completions.
    """

    def __init__(self, names: Sequence[str], writer: Writer) -> None:
        self._names, self._writer = names, writer
        self.last_reward = 0.0
        """The mean of the last population's finite rewards."""
        self.clear()

    def clear(self) -> None:
        self._found: dict[str, list[float]] = {}
        self._table: dict[str, list[Any]] = {}
        self._extra: dict[str, list[Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def log_metric(self, name: str, value: float) -> None:
        """For reward functions: a number of theirs."""
        self._found.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """For reward functions: a column of the table of completions."""
        self._extra[column] = list(values)

    def add(
        self,
        rows: Rows,
        tokens: Sequence[Sequence[int]],
        scored: Scored,
        reward: np.ndarray,
        kl: np.ndarray | None,
    ) -> None:
        """A population.

        Args:
            rows: of it.
            tokens: of its completions.
            scored: what reward functions gave them.
            reward: what the step goes by, shape (B,).
            kl: log p - log p_start of each, shape (B,).
        """
        of_group: dict[int, list[int]] = {}
        for position, group in enumerate(rows.groups):
            of_group.setdefault(group, []).append(position)
        spreads = [np.nan_to_num(_std(scored.total[some])) for some in of_group.values()]
        lengths = [len(some) for some in tokens]
        clipped = [not self._writer.is_complete(some) for some in tokens]
        self.last_reward = _mean(reward)
        found = {
            "reward": _mean(scored.total),
            "reward_std": float(np.mean(spreads)),
            "frac_reward_zero_std": float(np.mean([spread == 0 for spread in spreads])),
            "completions/mean_length": float(np.mean(lengths)),
            "completions/min_length": float(min(lengths)),
            "completions/max_length": float(max(lengths)),
            "completions/clipped_ratio": float(np.mean(clipped)),
            "completions/unscored": float((~np.isfinite(reward)).sum()),
        }
        for position, name in enumerate(self._names):
            column = scored.each[:, position]
            found[f"rewards/{name}/mean"] = _mean(column)
            found[f"rewards/{name}/std"] = _std(column)
        if kl is not None:
            found["kl"] = _mean(kl)
        for name, value in found.items():
            self.log_metric(name, value)
        decoded = zip(rows.prompts, tokens, strict=True)
        table: dict[str, list[Any]] = {
            "prompt": list(rows.prompts),
            "completion": [self._writer.decode(prompt, made) for prompt, made in decoded],
            **{name: scored.each[:, i].tolist() for i, name in enumerate(self._names)},
            "reward": reward.tolist(),
        }
        table |= {k: v for k, v in self._extra.items() if len(v) == len(tokens)}
        self._table, self._extra = table, {}

    def metrics(self) -> dict[str, float]:
        """Means over the populations since the last log."""
        return {name: float(np.mean(values)) for name, values in self._found.items()}

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
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):  # messages
        value = "\n".join(f"{message['role']}: {message['content']}" for message in value)
    from rich.markup import escape

    return escape(str(value))


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _std(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std()) if len(finite) else float("nan")
