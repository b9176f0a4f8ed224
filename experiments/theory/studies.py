"""Which models are looked at, on what, and how long."""

from __future__ import annotations

from dataclasses import dataclass

from ..finetune import model_name
from ..models import ModelError
from ..partition.problems import default_models
from .options import TheoryOptions


@dataclass(frozen=True)
class Study:
    """One model on one task.

    Attributes:
        task: a name in `TASKS`.
        rate: of the SGD whose trajectory is measured, for all parameters, as in the paper's Figure
            1: near the largest at which the whole model learns.
        length: steps of that trajectory.
        points: of it that are measured, ends included.
        vectors: random ones of a measurement of the whole model.
        scattered: points of the run that the scatter plot takes; 0: not in it.
        split: Figure 2's rates of base and adapter; None: not in Figure 2.
        steps: of Figure 2.
    """

    task: str
    rate: float
    length: int
    points: int
    vectors: int
    scattered: int
    split: tuple[float, float] | None = None
    steps: int = 0


STUDIES: dict[str, tuple[Study, ...]] = {
    "all-minilm-l6-v2": (Study("sst2", 1e-3, 120, 4, 20, 4, (3e-5, 0.1), 60),),
    "stories260k": (
        Study("sst2-sentences", 0.03, 300, 7, 100, 8, (1e-4, 10.0), 180),
        Study("sst2", 0.03, 300, 7, 100, 0),
    ),
}
"""By a part of the model's name."""


def chosen(options: TheoryOptions) -> list[tuple[str, Study]]:
    """Models that are asked for, by folder or hub id, with their studies.

    Raises:
        ModelError: there is no study of a model.
        DataError: no models are named, nor ZOFO_DATA.
    """
    found = []
    for model in options.models or default_models():
        own = next((STUDIES[name] for name in STUDIES if name in model_name(model)), None)
        if own is None:
            raise ModelError(f"--models must be of {', '.join(STUDIES)}, got {model!r}")
        found += [(model, study) for study in own]
    return found
