"""What is compared: methods and their options by reward, and the rates that are tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

POPULATION, FULL_SIZE, POLICY_GRADIENT, GRPO = "population", "full-size", "policy-gradient", "grpo"
METHODS = (POPULATION, FULL_SIZE, POLICY_GRADIENT, GRPO)

ZO_RATES = (3e-2, 1e-1, 3e-1)
FULL_RATES = (1e-2, 3e-2, 1e-1)
"""Of steps along few directions, which are longer at the same rate."""
FO_RATES = (3e-4, 1e-3, 3e-3)
MU = 2e-2
TOKENS = 32
BETA = 0.01
"""Of the penalty, a nat."""


@dataclass(frozen=True)
class Cell:
    """Runs that differ by rate and seed alone.

    Attributes:
        reward: of :data:`scores.SCORES`.
        method: of :data:`METHODS`.
        steps, eval_every: of each run.
        rates: that are tried.
        directions: of a step; 0 where there are none.
        rows: texts of a side of a direction; of a step, where there are no directions.
        rank: of the directions of a population.
        rule: for what an update makes of the slopes.
        common: whether both sides of a direction draw the same noise.
        beta: of the penalty for divergence from the start, a nat.
    """

    reward: str
    method: str
    steps: int
    eval_every: int
    rates: tuple[float, ...]
    directions: int = 0
    rows: int = 1
    rank: int = 1
    rule: str = "normalized"
    common: bool = True
    beta: float = 0.0

    @property
    def texts(self) -> int:
        """That a step generates."""
        return self.rows * (2 * self.directions or 1)

    @property
    def name(self) -> str:
        if not self.directions:
            return self.method
        parts = [f"{self.method}, {self.directions}"]
        parts += [f"{self.rows} texts a side"] * (self.rows > 1)
        parts += [f"rank {self.rank}"] * (self.rank > 1)
        parts += [self.rule] * (self.rule != "normalized")
        parts += ["noise of their own"] * (not self.common)
        return ", ".join(parts)

    @property
    def kind(self) -> str:
        """What its steps do, whatever texts are scored by: all that their memory depends on."""
        return f"{self.name}, with penalty" if self.beta else self.name

    @property
    def problem(self) -> str:
        """The reward, with or without penalty."""
        return f"{self.reward}-kl" if self.beta else self.reward

    @property
    def folder(self) -> str:
        return f"{self.problem}/{self.name.replace(', ', '-').replace(' ', '-')}"


def cells(reward: str) -> Iterator[Cell]:
    """In an order such that the first ones tell most."""
    if reward == "sentiment":  # whose scores take longer than the texts
        steps = (16, 12, 16)
    else:
        steps = (24, 12, 24) if reward == "style" else (30, 20, 24)
    population = Cell(reward, POPULATION, steps[0], 2, ZO_RATES, directions=64)
    gradient = Cell(reward, POLICY_GRADIENT, steps[1], steps[1] // 10, FO_RATES, rows=128)
    full = Cell(reward, FULL_SIZE, steps[2], 2, FULL_RATES, directions=4, rows=16)
    yield from (population, gradient)
    if reward in ("style", "graded-format"):
        yield full
    if reward == "style":
        yield replace(population, common=False)
        yield replace(population, directions=16, steps=40, eval_every=4)
        yield replace(population, directions=256, steps=12, eval_every=1)
        yield replace(full, directions=16, rows=1, steps=12, eval_every=1)
        yield replace(gradient, method=GRPO)
        yield replace(population, rank=4)
    if reward == "sentiment":
        yield replace(population, beta=BETA)
        yield replace(gradient, beta=BETA)


REWARDS: Sequence[str] = ("style", "format", "graded-format", "sentiment")
