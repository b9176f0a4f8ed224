"""What a journal costs a training, and how fast it is replayed."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zofo_kernels import Direction, Shift, Weights, perturb_, update_
from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, replay
from zofo_optim.journal import read

from . import minilm, plots
from .registry import Case, Comparison, Context, WrongResult, benchmark

STEPS = 4
"""Done by each call of a variant."""


@benchmark("journal", plot=plots.passes)
def cases(context: Context) -> Iterator[Case]:
    """four two-sided ZO steps of MiniLM, 16 x 32 tokens, with and without a journal; its replay"""
    for perturbation in ("in_place", "streamed"):
        for distribution in ("gaussian", "rademacher"):
            yield _case(context, perturbation, distribution)


class _Training:
    """Steps on one batch, with a journal or without."""

    def __init__(self, context: Context, journal: Path | None, **options: Any) -> None:
        rows, tokens = (2, 8) if context.quick else (16, 32)
        self.model: nn.Module = minilm.classifier(tiny=context.quick).to(context.device)
        self.model.requires_grad_(False)
        groups = hybrid_param_groups(self.model, zo=dict(lr=1e-6), verbose=False)
        batch = minilm.random_batch(self.model, rows, tokens, context.device)
        self.closure = minilm.loss_closure(self.model, batch)
        self.optimizer = HybridZOFO(groups, **options)
        self.journal = None if journal is None else Journal(journal).attach(self.optimizer)

    def run(self) -> None:
        for _ in range(STEPS):
            self.optimizer.step(self.closure)


def _case(context: Context, perturbation: str, distribution: str) -> Case:
    options = dict(perturbation=perturbation, distribution=distribution)
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "check.zofo"

    @functools.cache
    def training(name: str | None) -> _Training:
        return _Training(context, Path(folder.name) / name if name else None, **options)

    @functools.cache
    def base() -> dict[str, Tensor]:
        model = minilm.classifier(tiny=context.quick).to(context.device)
        return {name: p.detach() for name, p in model.named_parameters()}

    def check() -> None:
        made = _Training(context, file, **options)
        made.run()
        assert made.journal is not None
        made.journal.close()
        start = {name: p.clone() for name, p in base().items()}
        if replay(start, file).verified is not True:
            raise WrongResult(f"{perturbation}, {distribution}: replay gives other weights")

    def replayed() -> None:
        replay(base(), file, check=False)

    def passes() -> None:
        """The same without fusing: each pass of each step over all weights."""
        recording = read(file)
        weights = Weights(list(base().values()))
        for (part,) in recording.steps:
            carried = None
            for sample, scale in part.path:
                direction = Direction(part.seed, part.step, sample, distribution)
                perturb_(weights, direction, scale, recover=carried)
                carried = Shift(direction, scale)
            direction = Direction(part.seed, part.step, 0, distribution)
            update_(weights, [direction], torch.tensor(part.coefficients), part.lr, recover=carried)

    elements = sum(p.numel() for p in base().values())

    def bytes_a_step() -> float:
        """Of a journal's records, the header left out; the first says more than the others."""
        recording = read(file)
        ends = [record.end for record in recording.records]
        return (ends[STEPS - 1] - ends[0]) / (STEPS - 1)

    check()
    return Case(
        name=f"{perturbation}, {distribution}",
        sizes={"elements": elements, "tensors": len(base()), "steps": STEPS, "dtype": "float32"},
        variants={
            "steps": lambda: training(None).run(),
            "zofo steps, journal": lambda: training("run.zofo").run(),
            "zofo replay": replayed,
            "pass by pass": passes,
        },
        check=lambda: None,  # done: what it wrote is replayed
        comparisons=[
            Comparison(
                "journal's cost",
                "zofo steps, journal",
                "steps",
                "zofo steps, journal",
                plus=-1,
                percent=True,
            ),
            Comparison("steps / this =", "steps", "zofo replay", "zofo replay"),
            Comparison(
                "pass by pass / this =",
                "pass by pass",
                "zofo replay",
                "zofo replay",
            ),
        ],
        elements=STEPS * elements,
        notes={
            "journal bytes a step": bytes_a_step(),
            "journal header bytes": read(file).first,
            "seed": 0,
            "torch threads": torch.get_num_threads(),
        },
    )
