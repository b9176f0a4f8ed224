"""What is compared: kinds of directions by model, task and method, and the rates that are tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..studies import study_among

LOW_RANK = dict(structure="low_rank", perturbation="streamed")
KINDS: dict[str, dict[str, Any]] = {
    "Gaussian": {},
    "±1": dict(distribution="rademacher"),
    "rank 1": LOW_RANK,
    "rank 1, per example": dict(LOW_RANK, directions="per_example"),
    "rank 1, per example, normalized": dict(
        LOW_RANK, directions="per_example", zo_rule="normalized"
    ),
}
"""Settings of zeroth order by name; the first is MeZO's."""
BASELINE = "Gaussian"
NORMALIZED = "rank 1, per example, normalized"
BESIDE_ADAPTERS = "rank 1, per example"
"""With one-sided estimates: an evaluation more than first order's."""

ADAPTERS = ("prompt", "lora", "prefix")
ADAPTER_RATES = (1e-2, 3e-2, 1e-1)
LORA_RATES = (1e-3, 3e-3, 1e-2)
NORMALIZED_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
"""Of both models."""


@dataclass(frozen=True)
class Study:
    """A model, its tasks, and the rates that it is searched on.

    Attributes:
        model: a part of its name.
        tasks: the steps of each run, and the kinds of zeroth order alone.
        evaluations: in a run, beside the one at the start.
        zo: rates of zeroth order alone.
        beside: rates of zeroth order beside an adapter.
        fo: rates of full fine-tuning.
    """

    model: str
    tasks: Mapping[str, tuple[int, Sequence[str]]]
    evaluations: int
    zo: tuple[float, ...]
    beside: tuple[float, ...]
    fo: tuple[float, ...]


STUDIES = (
    Study(
        "stories260k",
        {
            "sst2-sentences": (600, tuple(KINDS)),
            "sst2": (300, (BASELINE, BESIDE_ADAPTERS)),
            "winogrande": (300, (BASELINE, BESIDE_ADAPTERS)),
        },
        evaluations=20,
        zo=(5e-5, 1e-4, 2e-4, 4e-4),
        beside=(3e-5, 1e-4, 3e-4),
        fo=(3e-4, 1e-3, 3e-3),
    ),
    Study(
        "minilm",
        {"sst2": (200, (BASELINE, BESIDE_ADAPTERS, NORMALIZED))},
        evaluations=10,
        zo=(1e-5, 3e-5, 1e-4, 3e-4),
        beside=(1e-5, 3e-5, 1e-4),
        fo=(1e-5, 3e-5, 1e-4),
    ),
)


@dataclass(frozen=True)
class Cell:
    """Runs that differ by rate and seed alone.

    Attributes:
        task, steps, eval_every: of each run.
        method: of the study of methods.
        kind: of directions; "" for first order alone.
        rate: which setting is searched, ``lr_zo`` or ``lr_fo``.
        rates: its values.
        after: the cell whose best rate of the adapter is taken.
    """

    task: str
    steps: int
    eval_every: int
    method: str
    kind: str
    rate: str
    rates: tuple[float, ...]
    after: Cell | None = None

    @property
    def name(self) -> str:
        return f"{self.method}, {self.kind}" if self.kind else self.method

    @property
    def folder(self) -> str:
        """Of its runs, below the model's."""
        return f"{self.task}/{self.method}" + f"/{self.kind.replace(', ', '-')}" * bool(self.kind)

    @property
    def options(self) -> dict[str, Any]:
        """Settings of its runs but for rates."""
        chosen: dict[str, Any] = dict(steps=self.steps, eval_every=self.eval_every, include=())
        chosen.update(samples=1, schedule="linear", optimizer="adamw", patience=0)
        if self.kind:
            chosen.update(KINDS[self.kind])
        if self.method.startswith("hybrid"):
            chosen["estimator"] = "one_sided"
        return chosen


def study_of(model: str) -> Study:
    """
    Raises:
        ModelError: none is of this model.
    """
    return study_among(STUDIES, model, "--model must be one of")


def cells(study: Study) -> Iterator[Sequence[Cell]]:
    """In an order such that the first ones tell most; those of a list hang together."""

    def cell(task: str, method: str, kind: str, **searched: Any) -> Cell:
        steps, _ = study.tasks[task]
        every = steps // study.evaluations
        return Cell(task=task, steps=steps, eval_every=every, method=method, kind=kind, **searched)

    for task, (_, kinds) in study.tasks.items():
        for kind in kinds:
            rates = NORMALIZED_RATES if kind == NORMALIZED else study.zo
            yield [cell(task, "zo", kind, rate="lr_zo", rates=rates)]
        yield [cell(task, "fo", "", rate="lr_fo", rates=study.fo)]
    for adapter in ADAPTERS:
        for task in study.tasks:
            rates = LORA_RATES if adapter == "lora" else ADAPTER_RATES
            alone = cell(task, f"fo-{adapter}", "", rate="lr_fo", rates=rates)
            beside = cell(
                *(task, f"hybrid-{adapter}", BESIDE_ADAPTERS),
                rate="lr_zo",
                rates=study.beside,
                after=alone,
            )
            yield [alone, beside]
