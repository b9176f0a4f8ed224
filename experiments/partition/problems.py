"""The problems of the grid: models with their data, and the order of batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..classification import Batch
from ..files import DataError
from ..finetune import first_head
from ..forms import FORMS
from ..heads import set_head
from ..models import DEFAULT_MODEL_PACKAGE, Problem, load_problem
from ..tasks import protocol

DATA_SEED = 0
GROUPED = 8
"""Batches whose examples are sorted by length together."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of examples. What is trained on, what chooses rates and weights, what is reported."""

    train: int = 1000
    dev: int = 150
    test: int = 500


def default_models() -> list[str]:
    """The encoder, and the causal language model in the folder that ZOFO_DATA names.

    Raises:
        DataError: the variable is not set.
    """
    data = os.environ.get("ZOFO_DATA")
    if not data:
        raise DataError(
            "--models and --data must be given, or the environment variable ZOFO_DATA name the "
            "folder with models/stories260k and sst2, got neither"
        )
    return [DEFAULT_MODEL_PACKAGE, str(Path(data).resolve() / "models" / "stories260k")]


def load(model: str, task: str, data: str, sizes: Sizes, head: str | None = None) -> Problem:
    """
    Args:
        head: an encoder's first one, of :data:`experiments.heads.HEADS`; default: zero-shot where
            the task has sentences for it, else random.

    Raises:
        DataError: the data is not there, or has another form.
        ModelError: the model cannot be loaded, or not for this task.
    """
    parts = protocol(task, data, DATA_SEED, sizes.train, sizes.dev, sizes.test)
    torch.manual_seed(DATA_SEED)
    problem = load_problem(
        model, FORMS[task], parts, dtype=torch.float32, device=torch.device("cpu")
    )
    if not problem.causal:
        set_head(problem, head or first_head(task))
    return problem


def batches(problem: Problem, size: int, seed: int) -> Iterator[Batch]:
    """Of training examples, without end: in an order that the seed decides, reshuffled each epoch.

    Rows of a batch have similar lengths, as with transformers' ``group_by_length``: examples are
    drawn for :data:`GROUPED` batches at a time, sorted, cut, and the batches shuffled. A last part
    of an epoch that fills no batch is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = problem.train.lengths
    if len(lengths) < size:
        raise DataError(f"a batch must have {size} training examples, got {len(lengths)} in all")
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        for start in range(0, len(order), size * GROUPED):
            own = sorted(order[start : start + size * GROUPED], key=lengths.__getitem__)
            cut = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
            for place in torch.randperm(len(cut), generator=generator).tolist():
                yield problem.train.batch(cut[place])


def longest_batch(problem: Problem, size: int) -> Batch:
    """The longest training examples."""
    lengths: Sequence[int] = problem.train.lengths
    return problem.train.batch(sorted(range(len(lengths)), key=lengths.__getitem__)[-size:])
