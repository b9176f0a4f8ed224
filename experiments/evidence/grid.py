"""What runs: methods by model and task, and where the search of each rate begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..partition.grid import MIDDLE, Cell, Study
from ..partition.recipes import (
    ALL,
    COUPLING,
    GAUSSIAN,
    LORA,
    PARTITION,
    PER_EXAMPLE,
    PREFIX,
    PROMPT,
    Recipe,
    Saving,
)

SGD = f"{ALL}, sgd"
ENCODER, CAUSAL = "all-minilm-l6-v2", "stories260k"
STARTS = {
    ENCODER: {
        **{ALL: 1e-4, SGD: 3e-3, LORA: 3e-3, PROMPT: 3e-2, PREFIX: 3e-2},
        **{PARTITION: 1e-4, "": 3e-5},
    },
    CAUSAL: {
        **{ALL: 3e-4, SGD: 3e-2, LORA: 3e-3, PROMPT: 1e-1, PREFIX: 1e-1},
        **{PARTITION: 1e-3, "": 1e-4},
    },
}
"""Near the best rates of `partition/`, whose runs are taken over, and of `directions/`."""


def _study(model: str, task: str, steps: int) -> Study:
    return Study(model, task, steps=steps, batch=8, evaluations=5, head=False, starts=STARTS[model])


STUDIES = (
    _study(ENCODER, "sst2", 100),
    _study(CAUSAL, "sst2-sentences", 200),
    _study(CAUSAL, "sst2", 100),
    _study(CAUSAL, "copa", 100),
    _study(CAUSAL, "winogrande", 100),
    _study(CAUSAL, "wic", 100),
    _study(ENCODER, "wic", 100),
)
"""The protocol of `partition/`, on all tasks; in the order of the page."""


def cells(study: Study) -> Sequence[Cell]:
    """In order of tiers; a cell comes after those that its rates are of."""
    return sorted(_cells(study), key=lambda cell: cell.tier)


def _cells(study: Study) -> Iterator[Cell]:
    starts = study.starts

    def cell(recipe: Recipe, fo: float | Cell | None, zo: float | Cell | None, tier: int) -> Cell:
        return Cell(study.task, recipe, fo, zo, tier=tier)

    yield cell(Recipe(ALL), starts[ALL], None, 0)
    yield cell(Recipe(kind=GAUSSIAN), None, starts[""], 0)
    yield cell(Recipe(kind=PER_EXAMPLE), None, starts[""], 0)
    for name, tier in ((LORA, 0), (PROMPT, 1), (PREFIX, 2)):
        alone = cell(Recipe(name), starts[name], None, tier)
        yield alone
        yield cell(Recipe(name, PER_EXAMPLE), alone, starts[""], max(tier, 1))
    yield cell(Recipe(ALL, optimizer="sgd"), starts[SGD], None, 0)
    few = Recipe(PARTITION, of="flops", budget=MIDDLE)
    frozen = cell(few, starts[PARTITION], None, 2)
    yield frozen
    yield cell(replace(few, kind=GAUSSIAN, coupling=COUPLING), frozen, starts[""], 2)


CHECKPOINTED = Saving(checkpointed=True)
LEAST = Saving(in_backward=True, checkpointed=True)


def savings(recipe: Recipe) -> Sequence[Saving]:
    """Ways of a step that change no result, beside the plain one."""
    if recipe.first == ALL:
        return (CHECKPOINTED, LEAST)
    return (CHECKPOINTED,) if recipe.first in (LORA, PROMPT) else ()
