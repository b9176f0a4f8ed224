"""The grid: models, formats of their base, methods, and where searches of rates begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..studies import folder_of, study_among
from .bases import BF16, BNB_INT8, BNB_NF4, INT4, INT8

NOTHING, ZO, LORA, HYBRID = "no training", "ZO", "LoRA", "hybrid LoRA"
MU = {True: 1e-2, False: 1e-3}
"""Displacements: of scales, in units of their size; of 16-bit weights."""
SCALES = r"\.(scale|absmax|SCB)$"
"""Names of quantisation scales in the formats' state dicts."""


@dataclass(frozen=True)
class Study:
    """A model on SST-2, and where searches begin.

    Attributes:
        model: a part of its name.
        steps, batch, evaluations: of each run; evaluations beside that at the start.
        starts: rates that searches begin at: of scales, of 16-bit weights, of LoRA, and of either
            base beneath LoRA.
    """

    model: str
    steps: int
    batch: int
    evaluations: int
    starts: dict[tuple[str, bool], float] = field(hash=False)


STUDIES = (
    Study(
        "stories260k",
        steps=300,
        batch=16,
        evaluations=4,
        starts={
            (ZO, True): 1e-2,
            (ZO, False): 1e-4,
            (LORA, True): 1e-2,
            (LORA, False): 1e-2,
            (HYBRID, True): 3e-3,
            (HYBRID, False): 3e-5,
        },
    ),
    Study(
        "minilm",
        steps=150,
        batch=16,
        evaluations=4,
        starts={
            (ZO, True): 1e-3,
            (ZO, False): 1e-6,
            (LORA, True): 3e-3,
            (LORA, False): 3e-3,
            (HYBRID, True): 1e-3,
            (HYBRID, False): 1e-6,
        },
    ),
)


@dataclass(frozen=True)
class Cell:
    """Runs that differ by rate and seed alone.

    Attributes:
        format: of the base, of :data:`bases.FORMATS`.
        method: one of the constants above.
    """

    format: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.format}, {self.method}"

    @property
    def quantised(self) -> bool:
        return self.format != BF16

    @property
    def searched(self) -> bool:
        """Whether it has a rate of its own."""
        return self.method != NOTHING

    @property
    def adapter(self) -> Cell | None:
        """The one whose adapter's rate it takes, if it has both."""
        return replace(self, method=LORA) if self.method == HYBRID else None

    @property
    def folder(self) -> str:
        """Of its runs, below the model's."""
        return folder_of(self.name).replace("(", "").replace(")", "")


def study_of(model: str) -> Study:
    """
    Raises:
        ModelError: none is of this model.
    """
    return study_among(STUDIES, model)


def cells() -> Sequence[Cell]:
    """Those that tell most first."""
    first = (BF16, INT8, INT4)
    return [
        *(Cell(format, NOTHING) for format in (*first, BNB_NF4, BNB_INT8)),
        *(Cell(format, ZO) for format in (*first, BNB_NF4)),
        *(Cell(format, method) for method in (LORA, HYBRID) for format in (BF16, INT4)),
        Cell(BNB_INT8, ZO),
        *(Cell(format, method) for method in (LORA, HYBRID) for format in (BNB_NF4, INT8)),
    ]
