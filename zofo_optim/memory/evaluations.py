"""Evaluations in a rehearsal: the loss, and who answers torch calls at displaced weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..groups import split_of
from ..losses import add_decoder_inputs, example_losses, task_of
from ..names import within_peft
from ..perturbation.low_rank import Source
from ..perturbation.verification import _parts
from ..saved_copies import SavedCopies
from ..watch import Answer
from ..zeroth_order import ZerothOrder
from .asked import Asked
from .rehearsal import Rehearsal
from .streamed import RehearsedLowRank, RehearsedStreaming, closed_forms, factor_bytes, sources_of


class Closure:
    """The loss of a batch without data, or the losses of its examples.

    Args:
        model: on meta.
        inputs: of its forward, with labels.
        asked: the settings.

    Raises:
        ValueError: examples cannot be divided among directions.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any], asked: Asked) -> None:
        self._model, self._per_example = model, asked.directions == "per_example"
        self._inputs = dict(inputs)
        self.examples = len(inputs["labels"])
        self.logits = 0
        multiple = asked.settings.examples_of_a_direction
        if self._per_example and self.examples % multiple:
            raise ValueError(
                f"batch must have a multiple of {multiple} rows where "
                f"estimator={asked.estimator!r} and examples_per_direction="
                f"{asked.examples_per_direction}, got {self.examples}"
            )
        if self._per_example:
            self._labels = self._inputs.pop("labels")
            self._task = task_of(model, self._labels)
            if self._task == "seq2seq_lm":
                add_decoder_inputs(within_peft(model), self._inputs, self._labels)

    def __call__(self) -> Tensor:
        outputs = self._model(**self._inputs)
        logits = getattr(outputs, "logits", None)
        self.logits = 0 if logits is None else logits.nbytes
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
    """What answers the torch calls of evaluations at displaced weights.

    Args:
        model: on meta.
        asked: its settings.
        examples: of the batch.
    """

    def __init__(self, model: nn.Module, asked: Asked, examples: int) -> None:
        self._settings, self._examples = asked.settings, examples
        self._streams = asked.perturbation == "streamed"
        self._low_rank = asked.structure == "low_rank"
        self._reads_rows = asked.device == "cpu"
        self._sources: dict[int, Source] = {}
        if self._streams:
            rules = ZerothOrder(
                model, directions=asked.directions, quantized=asked.choice, without_data=True
            )
            split = split_of(model, lambda _, p: "fo" if p.requires_grad else "zo", rules)
            self._sources = sources_of(split.zo)

    def steady(self, saved: SavedCopies | None = None) -> Answer | None:
        """None in place.

        Args:
            saved: keeps copies out of graphs.
        """
        if not self._streams:
            return None
        forms = None
        if self._low_rank:
            low_rank = RehearsedLowRank(list(self._sources.values()))
            forms = closed_forms(self._sources, low_rank, self._settings, self._examples)
        return self._streaming(forms=forms, saved=saved)

    def verifying(self, rehearsal: Rehearsal, where: str) -> int:
        """The most beside what is always there: copies, and the content of the largest weight.

        Factors of low rank are there meanwhile. Weights of a map that were displaced, or put
        back, are resident until their modules are evaluated.

        Args:
            where: weights are: in "memory", in a "map", or on the "host" of a device.
        """
        if not self._streams or not self._sources:
            return rehearsal.evaluation()
        factors = 0
        if self._low_rank:
            factors = factor_bytes(self._sources, self._settings, self._examples)
        parts = [[s.parameter for s in part] for part in _parts([*self._sources.values()])]
        sizes = [sum(p.nbytes for p in part) for part in parts]
        last = max(range(len(parts)), key=lambda k: (sizes[k], k))
        if where != "map":  # a host has the content of its weights
            kept = max(sizes) if where == "memory" else 0
            return kept + rehearsal.evaluation(self._streaming()) + factors
        resident = [*(parts[last - 1] if last else ()), *parts[last]]
        moved = max(p.nbytes for p in parts[last])  # what it is displaced by is made first
        displacing: int = sizes[last] + moved + sum(p.nbytes for p in resident)
        copies = self._streaming(displaced=[id(p) for p in parts[last]])
        evaluated = sizes[last] + rehearsal.evaluation(copies, resident)
        return max(displacing, evaluated) + factors

    def _streaming(self, **more: Any) -> RehearsedStreaming:
        return RehearsedStreaming(self._sources, reads_rows=self._reads_rows, **more)
