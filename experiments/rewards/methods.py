"""Steps of the methods that are compared, but for GRPO's, which are TRL's own (`grpo.py`)."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from zofo_optim import HybridZOFO, common_noise, hybrid_param_groups

from .grid import FULL_SIZE, MU, POLICY_GRADIENT, POPULATION, Cell
from .texts import Judge, Writer


class Method(Protocol):
    """One way to make a reward rise."""

    optimizer: torch.optim.Optimizer

    def verify(self) -> None:
        """Checks of the first step, before it."""

    def step(self) -> None: ...


class Population:
    """Every pair of rows has a direction of its own: a step is one ``generate()``."""

    def __init__(self, writer: Writer, judge: Judge, cell: Cell, rate: float, seed: int) -> None:
        self._writer, self._judge, self._cell = writer, judge, cell
        kind: dict[str, Any] = dict(structure="low_rank", rank=cell.rank, perturbation="streamed")
        kind.update(directions="per_example", examples_per_direction=cell.rows)
        writer.model.requires_grad_(False)
        zo = dict(lr=rate, mu=MU, maximize=True)
        groups = hybrid_param_groups(writer.model, zo=zo, directions="per_example", verbose=False)
        self.optimizer = HybridZOFO(
            groups, **kind, estimator="antithetic", zo_rule=cell.rule, seed=seed
        )

    def verify(self) -> None:
        """The first step's checks, by logits of the prompt: they generate nothing."""
        prompt = self._writer.prompt.repeat(self._cell.texts, 1)

        def moments() -> Tensor:
            logits: Tensor = self._writer.model(prompt).logits[:, -1]
            return logits.square().mean(1)

        self.optimizer.verify(moments)

    def step(self) -> None:
        self.optimizer.step(self._worth)

    def _worth(self) -> Tensor:
        if self._cell.common:
            with common_noise(self.optimizer):
                ids = self._writer.sample(self._cell.texts)
        else:
            ids = self._writer.sample(self._cell.texts)
        return self._judge.worth(self._writer, ids)


class FullSize:
    """The recipe of peers: full Gaussian directions, in place, two ``generate()`` for each one.

    Both sides of a direction draw the same noise; each direction, its own.
    """

    def __init__(self, writer: Writer, judge: Judge, cell: Cell, rate: float, seed: int) -> None:
        self._writer, self._judge, self._cell, self._seed = writer, judge, cell, seed
        self._evaluations = 0
        writer.model.requires_grad_(False)
        zo = dict(lr=rate, mu=MU, maximize=True)
        self.optimizer = HybridZOFO(
            hybrid_param_groups(writer.model, zo=zo, verbose=False),
            num_samples=cell.directions,
            zo_rule=cell.rule,
            seed=seed,
        )

    def verify(self) -> None:
        """As that of :class:`Population`."""
        model = self._writer.model
        self.optimizer.verify(lambda: model(self._writer.prompt).logits[:, -1].square().mean())

    def step(self) -> None:
        self._evaluations = 0
        self._step_seed = int(torch.randint(2**62, ()))
        self.optimizer.step(self._worth)

    def _worth(self) -> Tensor:
        direction = self._evaluations // 2  # a side after the other
        self._evaluations += 1
        # all evaluations of a step find the generator in one state: directions would share noise
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._step_seed + direction)
            ids = self._writer.sample(self._cell.rows)
        return self._judge.worth(self._writer, ids).mean()


class PolicyGradient:
    """REINFORCE: log-probabilities of a step's texts, weighted by their advantages over the group.

    Worth less the step's mean, over its deviation. All weights learn, by AdamW.
    """

    def __init__(self, writer: Writer, judge: Judge, cell: Cell, rate: float, seed: int) -> None:
        self._writer, self._judge, self._cell = writer, judge, cell
        writer.model.requires_grad_(True)
        weights = writer.model.parameters()
        self.optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)

    def verify(self) -> None:
        """There is nothing to check."""

    def step(self) -> None:
        ids = self._writer.sample(self._cell.texts)
        worth = self._judge.worth(self._writer, ids)
        advantages = (worth - worth.mean()) / (worth.std() + 1e-4)
        likelihoods = self._writer.log_probabilities(ids)
        self.optimizer.zero_grad()
        loss = -(advantages * likelihoods).mean() / self._writer.tokens
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


STEPPED: dict[str, Any] = {
    POPULATION: Population,
    FULL_SIZE: FullSize,
    POLICY_GRADIENT: PolicyGradient,
}
"""Classes by the method's name."""
