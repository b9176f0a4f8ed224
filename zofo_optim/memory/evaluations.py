"""Evaluations in a rehearsal: the loss, and who answers torch calls at displaced weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..groups import split_of
from ..losses import example_losses, task_of
from ..settings import Settings
from ..watch import Answer
from ..zeroth_order import ZerothOrder
from .rehearsal import Rehearsal
from .streamed import RehearsedLowRank, RehearsedStreaming, closed_forms, factor_bytes, sources_of


class Closure:
    """The loss of a batch without data, or the losses of its examples."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], per_example: bool) -> None:
        self._model, self._per_example = model, per_example
        self._inputs = dict(inputs)
        self.examples = len(inputs["labels"])
        self.logits = 0
        if per_example:
            self._labels = self._inputs.pop("labels")
            self._task = task_of(model, self._labels)

    def __call__(self) -> Tensor:
        outputs = self._model(**self._inputs)
        logits = getattr(outputs, "logits", None)
        self.logits = 0 if logits is None else logits.numel() * logits.element_size()
        if not self._per_example:
            loss = getattr(outputs, "loss", None)
            if not isinstance(loss, Tensor):
                raise TypeError(
                    "model must give outputs with a loss, as those of transformers do, got "
                    f"{type(outputs).__name__}"
                )
            return loss
        losses = example_losses(outputs, self._labels, self._task)
        return losses.mean() if torch.is_grad_enabled() else losses


class Answers:
    """What answers the torch calls of evaluations at displaced weights."""

    def __init__(self, model: nn.Module, settings: Settings, examples: int, device: str) -> None:
        rules = ZerothOrder(model, directions=settings.directions, without_data=True)
        split = split_of(model, lambda _, p: "fo" if p.requires_grad else "zo", rules)
        self._streams = settings.perturbation == "streamed"
        self._sources = sources_of(split.zo)
        self._settings, self._examples = settings, examples
        self._low_rank = settings.structure == "low_rank"
        self._reads_rows = device == "cpu"
        self._parts = sorted(p.numel() * p.element_size() for p in split.zo.values())

    def steady(self) -> Answer | None:
        """None in place."""
        if not self._streams:
            return None
        forms = None
        if self._low_rank:
            low_rank = RehearsedLowRank(list(self._sources.values()))
            forms = closed_forms(self._sources, low_rank, self._settings, self._examples)
        return RehearsedStreaming(self._sources, forms, reads_rows=self._reads_rows)

    def verifying(self, rehearsal: Rehearsal) -> int:
        """The most beside what is always there: copies, and the content of the largest weight.

        Factors of low rank are there meanwhile.
        """
        if not self._streams:
            return rehearsal.evaluation()
        copies = RehearsedStreaming(self._sources, None, reads_rows=self._reads_rows)
        kept = self._parts[-1] if self._parts else 0
        factors = 0
        if self._low_rank:
            factors = factor_bytes(self._sources, self._settings, self._examples)
        return kept + rehearsal.evaluation(copies) + factors
