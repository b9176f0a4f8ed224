"""The grid: models, tasks, methods, where each rate comes from, and in what order they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..studies import folder_of, study_among

NOTHING, PROBE, LORA, ZO, PLUGGED, SCALED, REFINED = (
    "no adapter",
    "probe",
    "LoRA",
    "ZO",
    "transferred",
    "scaled",
    "refined",
)
SMALL, BRIDGE = "small", "bridge"
ROUTES = (SMALL, BRIDGE)
"""Where an adapter is trained: on a plain slice of the layers, or on a bridge model."""
RANK = 8


@dataclass(frozen=True)
class Study:
    """A large model, its tasks, and where searches begin.

    Attributes:
        model: a part of its name.
        tasks: of :data:`experiments.tasks.TASKS`, the one that tells most first.
        steps, batch, evaluations: of each run by first order; evaluations beside that at the start.
        longer: times the steps, of zeroth order.
        head: whether it has a head, which is in the adapter.
        starts: rates that searches begin at, by method.
    """

    model: str
    tasks: tuple[str, ...]
    steps: int
    batch: int
    evaluations: int
    longer: float
    head: bool
    starts: dict[str, float] = field(hash=False)


STUDIES = (
    Study(
        "minilm",
        ("sst2", "wic"),
        steps=100,
        batch=16,
        evaluations=4,
        longer=1.5,
        head=True,
        starts={LORA: 3e-3, PLUGGED: 3e-3, ZO: 3e-5, REFINED: 1e-4},
    ),
    Study(
        "stories260k",
        ("sst2", "wic"),
        steps=200,
        batch=16,
        evaluations=4,
        longer=1.5,
        head=False,
        starts={LORA: 1e-2, PLUGGED: 1e-2, ZO: 1e-4, REFINED: 1e-3},
    ),
)


@dataclass(frozen=True)
class Cell:
    """Runs that differ by rate and seed alone.

    Attributes:
        method: one of the constants above.
        route, layers: of the small model, where there is one.
    """

    method: str
    route: str = ""
    layers: int = 0

    @property
    def name(self) -> str:
        ends = {PLUGGED: "", SCALED: ", scaled", REFINED: f" + {ZO}"}
        if self.method in ends:
            return f"{self.route} {self.layers}{ends[self.method]}"
        return self.method

    @property
    def searched(self) -> bool:
        """Whether it has a rate of its own."""
        return self.method not in (NOTHING, PROBE, SCALED)

    @property
    def adapter(self) -> Cell | None:
        """The one that trains its adapter, if that is another."""
        return replace(self, method=PLUGGED) if self.method in (SCALED, REFINED) else None

    @property
    def folder(self) -> str:
        """Of its runs, below the task's."""
        return folder_of(self.name)


ZO_ALONE = Cell(ZO)
BRIDGED = Cell(PLUGGED, BRIDGE, 3)
REFINEMENT = Cell(REFINED, BRIDGE, 3)
"""Of the route that was fixed before any run."""


def study_of(model: str) -> Study:
    """
    Raises:
        ModelError: none is of this model.
    """
    return study_among(STUDIES, model)


def cells(study: Study) -> Sequence[Cell]:
    """Those that tell most first; one comes after those that its rates are of."""
    probe = [Cell(PROBE)] if study.head else []
    return [
        *(Cell(NOTHING), *probe, Cell(LORA)),
        *(Cell(PLUGGED, SMALL, 3), BRIDGED),
        *(Cell(SCALED, SMALL, 3), Cell(SCALED, BRIDGE, 3)),
        *(ZO_ALONE, REFINEMENT),
        *(Cell(PLUGGED, SMALL, 2), Cell(PLUGGED, BRIDGE, 2)),
    ]
