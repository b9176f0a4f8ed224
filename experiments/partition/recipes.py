"""What trains by first order, what by zeroth order, and what a step of it can save memory by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..presets import ATTENTION_BIASES

NOTHING, ALL, HEAD, TOP, LORA, PARTITION = "", "full", "head", "top layer", "LoRA", "partition"
PROMPT, PREFIX = "prompt", "prefix"
FIRST = (NOTHING, ALL, HEAD, TOP, LORA, PROMPT, PREFIX, PARTITION)
"""What trains by first order. `head`: an encoder's classifier; `top layer`: the last layer and what
comes after it; adapters with an encoder's head; `partition`: the tensors that are worth most within
a budget."""

FROZEN, GAUSSIAN, PER_EXAMPLE, BIASES = "", "ZO Gaussian", "ZO per example", "ZO biases"
KINDS: dict[str, dict[str, Any]] = {
    GAUSSIAN: {},
    PER_EXAMPLE: dict(structure="low_rank", perturbation="streamed", directions="per_example"),
    BIASES: {},
}
"""How the rest trains by zeroth order; Hi-ZFO's own and MeZO's is the first, moved in place."""
INCLUDED: dict[str, tuple[str, ...]] = {BIASES: ATTENTION_BIASES}
"""Of the rest, what alone trains by zeroth order; the attention's biases are few, and gain most."""

COUPLING = 0.1
"""Hi-ZFO's weight of the perturbed loss in the first-order gradients."""
MU = 1e-3


@dataclass(frozen=True)
class Recipe:
    """What trains how.

    Attributes:
        first: one of :data:`FIRST`.
        kind: of :data:`KINDS`, for all that is not first-order; FROZEN: it stays.
        layers: of LoRA, from the top; 0: all.
        of, budget: of a partition: a share of "flops" or "memory".
        optimizer: of first order, "adamw" or "sgd".
        coupling: weight of the perturbed loss in first-order gradients.

    Raises:
        ValueError: the parts do not fit together.
    """

    first: str = NOTHING
    kind: str = FROZEN
    layers: int = 0
    of: str = ""
    budget: float = 0.0
    optimizer: str = "adamw"
    coupling: float = 0.0

    def __post_init__(self) -> None:
        if self.first not in FIRST:
            raise ValueError(f"first must be one of {FIRST}, got {self.first!r}")
        if self.kind not in (FROZEN, *KINDS):
            raise ValueError(f"kind must be one of {(FROZEN, *KINDS)}, got {self.kind!r}")
        if not (self.first or self.kind):
            raise ValueError("first or kind must be given, got neither: nothing would train")
        if self.first == ALL and self.kind:
            raise ValueError(f"kind must be {FROZEN!r} where all is first-order, got {self.kind!r}")
        if self.coupling and not self.is_hybrid:
            raise ValueError(f"coupling must be 0 but in hybrids, got {self.coupling}")
        if (self.first == PARTITION) != bool(self.of and self.budget):
            raise ValueError(
                "of and budget must be given for partitions, and for nothing else, "
                f"got {self.of!r} and {self.budget} for {self.first!r}"
            )

    @property
    def is_hybrid(self) -> bool:
        return bool(self.first and self.kind)

    @property
    def second(self) -> Recipe | None:
        """The same first-order part, the rest frozen; None where there is no such."""
        return replace(self, kind=FROZEN, coupling=0.0) if self.is_hybrid else None

    @property
    def name(self) -> str:
        """Both parts, joined by +; frozen is what is not named."""
        first = self.first
        if self.first == LORA and self.layers:
            first = f"{LORA} top {self.layers}"
        elif self.first == PARTITION:
            first = f"{self.budget:g} of {self.of}"
        first += " by SGD" if self.optimizer == "sgd" else ""
        parts = [part for part in (first, self.kind) if part]
        return " + ".join(parts) + (f", coupling {self.coupling:g}" if self.coupling else "")


@dataclass(frozen=True)
class Saving:
    """Ways of a step to take less memory, which change no result.

    Attributes:
        in_backward: gradients are applied and freed as they come (LOMO; Lv et al. 2023).
        checkpointed: layers are evaluated again in the backward, not kept (Chen et al. 2016).
    """

    in_backward: bool = False
    checkpointed: bool = False

    @property
    def name(self) -> str:
        parts = ["in backward"] * self.in_backward + ["checkpointed"] * self.checkpointed
        return ", ".join(parts)


PLAIN = Saving()
SAVINGS = (PLAIN, Saving(in_backward=True), Saving(checkpointed=True), Saving(True, True))


def step_name(recipe: Recipe, saving: Saving = PLAIN) -> str:
    """Of a step, as the tables call it."""
    return recipe.name + (f", {saving.name}" if saving.name else "")


def savings_of(recipe: Recipe) -> tuple[Saving, ...]:
    """Those worth measuring: of what propagates errors through the whole model, all."""
    if recipe.first in (ALL, LORA) and not recipe.layers and not recipe.kind:
        return SAVINGS
    if recipe.first == PARTITION and not recipe.coupling:
        return SAVINGS[:2]
    return SAVINGS[:1]
