"""The grid: recipes by model and task, where each rate comes from, and in what order they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..studies import folder_of, study_among
from .recipes import (
    ALL,
    BIASES,
    COUPLING,
    GAUSSIAN,
    HEAD,
    LORA,
    PARTITION,
    PER_EXAMPLE,
    TOP,
    Recipe,
)

BUDGETS = (0.3, 0.1, 0.6)
"""Shares of full back-propagation's FLOPs that Hi-ZFO is tried at, and its authors', 0.6."""
MIDDLE = BUDGETS[0]
MEMORY_BUDGETS = (0.2, 0.5)
COUPLINGS = (0.0, 0.5)
"""Beside Hi-ZFO's own."""
LONGER = 3
"""Times the steps, where zeroth order needs more of them to show."""
RATIOS = (0.1, 0.3, 0.5, 0.7)
"""Of the rates of zeroth and first order."""


@dataclass(frozen=True)
class Study:
    """A model, its task, and where searches begin.

    Attributes:
        model: a part of its name.
        task: of :data:`experiments.tasks.TASKS`.
        steps, batch, evaluations: of each run; evaluations beside that at the start.
        head: whether it has a head that trains apart from the rest.
        starts: rates that searches begin at, by what trains first-order; zeroth order under "",
            or its kind.
    """

    model: str
    task: str
    steps: int
    batch: int
    evaluations: int
    head: bool
    starts: dict[str, float] = field(hash=False)


STUDIES = (
    Study(
        "minilm",
        "sst2",
        steps=100,
        batch=8,
        evaluations=5,
        head=True,
        starts={
            ALL: 1e-4,
            f"{ALL}, sgd": 3e-2,
            PARTITION: 1e-4,
            LORA: 3e-3,
            HEAD: 1e-2,
            "": 3e-5,
            BIASES: 3e-2,
        },
    ),
    Study(
        "stories260k",
        "sst2-sentences",
        steps=200,
        batch=8,
        evaluations=5,
        head=False,
        starts={ALL: 1e-3, f"{ALL}, sgd": 3e-2, PARTITION: 1e-3, LORA: 3e-3, "": 1e-4},
    ),
)


@dataclass(frozen=True)
class From:
    """A search that begins at the best rate of another cell."""

    cell: Cell


@dataclass(frozen=True)
class Cell:
    """Runs that differ by rate and seed alone.

    Attributes:
        task: of the runs.
        recipe: what trains how.
        fo, zo: where the rate comes from: a number or :class:`From`, where its search begins; a
            cell, whose best one is taken; None, where there is none.
        ratio: of the rate of zeroth order to that of first order, in place of ``zo``.
        times: of the study's steps.
        equal_seconds: as many steps as take the seconds of full fine-tuning, not as many as its.
        tier: those of lower ones run first, whatever the model.
    """

    task: str
    recipe: Recipe
    fo: float | From | Cell | None
    zo: float | From | Cell | None
    ratio: float | None = None
    times: int = 1
    equal_seconds: bool = False
    tier: int = 0

    @property
    def searched(self) -> str | None:
        """Which rate is searched, ``fo`` or ``zo``."""
        sources = {"fo": self.fo, "zo": self.zo}
        return next((name for name, at in sources.items() if isinstance(at, float | From)), None)

    @property
    def coupled(self) -> bool:
        """Whether it is Hi-ZFO, whatever its coupling."""
        return self.recipe.first == PARTITION and self.recipe.kind == GAUSSIAN

    @property
    def name(self) -> str:
        name = self.recipe.name
        if self.ratio is not None:
            name += f", ratio {self.ratio:g}"
        name += f", {self.times} times the steps" * (self.times > 1)
        return name + ", equal seconds" * self.equal_seconds

    @property
    def folder(self) -> str:
        """Of its runs, below the model's."""
        return f"{self.task}/{folder_of(self.name)}"


def study_of(model: str) -> Study:
    """
    Raises:
        ModelError: none is of this model.
    """
    return study_among(STUDIES, model)


def cells(study: Study) -> Sequence[Cell]:
    """In order of tiers; a cell comes after those that its rates are of."""
    made = {cell.name: cell for cell in _cells(study)}
    return sorted(made.values(), key=lambda cell: cell.tier)


def _cells(study: Study) -> Iterator[Cell]:
    starts = study.starts

    def cell(recipe: Recipe, fo: float | Cell | None, zo: float | Cell | None, tier: int) -> Cell:
        return Cell(study.task, recipe, fo, zo, tier=tier)

    top = Recipe(LORA, layers=1)
    full = cell(Recipe(ALL), starts[ALL], None, 0)
    lora = cell(Recipe(LORA), starts[LORA], None, 0)
    mezo = cell(Recipe(kind=GAUSSIAN), None, starts[""], 0)
    examples = cell(Recipe(kind=PER_EXAMPLE), None, starts[""], 0)
    yield from (full, lora)
    base = examples  # whose rate of zeroth order is taken beside a small first-order part
    small: list[Cell] = []
    if study.head:
        head = cell(Recipe(HEAD), starts[HEAD], None, 0)
        base = cell(Recipe(HEAD, PER_EXAMPLE), head, starts[""], 0)
        biases = cell(Recipe(HEAD, BIASES), head, starts[BIASES], 0)
        yield from (head, base, biases)
        small += [head, base, biases]
        yield from _longer(head, base, biases)
        yield Cell(study.task, top, From(lora), None, times=LONGER, tier=2)
    few = Recipe(PARTITION, of="flops", budget=MIDDLE)
    frozen = cell(few, starts[PARTITION], None, 0)
    hizfo = cell(replace(few, kind=GAUSSIAN, coupling=COUPLING), frozen, starts[""], 0)
    beside = cell(replace(few, kind=PER_EXAMPLE), frozen, starts[""], 2)
    yield from (frozen, hizfo, mezo, examples, beside)
    for budget in BUDGETS[1:]:
        yield cell(replace(frozen.recipe, budget=budget), frozen, None, 2)
        yield cell(replace(hizfo.recipe, budget=budget), frozen, hizfo, 2)
    lora_top = cell(top, lora, None, 2)
    lora_beside = cell(replace(top, kind=PER_EXAMPLE), lora, base, 2)
    sgd = cell(Recipe(ALL, optimizer="sgd"), starts[f"{ALL}, sgd"], None, 2)
    yield from (lora_top, lora_beside, sgd)
    if study.head:
        yield cell(replace(top, kind=BIASES), lora, biases, 2)
    for one in (lora, *small, lora_top, frozen, hizfo, beside):
        yield replace(one, equal_seconds=True, fo=_of(one, "fo"), zo=_of(one, "zo"), tier=3)
    for coupling in COUPLINGS:
        yield cell(replace(hizfo.recipe, coupling=coupling), frozen, hizfo, 4)
    for ratio in RATIOS:
        yield replace(hizfo, zo=None, ratio=ratio, tier=4)
    yield cell(Recipe(TOP), frozen, None, 5)
    yield cell(Recipe(TOP, PER_EXAMPLE), frozen, beside, 5)
    for layers in (3, 2):
        yield cell(Recipe(LORA, layers=layers), lora, None, 5)
        yield cell(Recipe(LORA, PER_EXAMPLE, layers=layers), lora, base, 5)
    for budget in MEMORY_BUDGETS:
        part = Recipe(PARTITION, of="memory", budget=budget)
        yield cell(part, frozen, None, 5)
        yield cell(replace(part, kind=GAUSSIAN, coupling=COUPLING), frozen, hizfo, 5)


def _longer(head: Cell, *beside: Cell) -> Iterator[Cell]:
    """Those in which no error is propagated far, in more steps; rates are searched anew."""
    long = replace(head, fo=From(head), times=LONGER, tier=1)
    yield long
    for place, one in enumerate(beside):
        yield replace(one, fo=long, zo=From(one), times=LONGER, tier=1 + (place > 0))


def _of(cell: Cell, name: str) -> Cell | None:
    """Where another cell takes this rate from, which is the cell's own."""
    return None if getattr(cell, name) is None else cell
