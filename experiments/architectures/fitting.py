"""The batch that a model takes, found by trying."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from .batches import MAKERS, Batch, batch_for, parameters_of
from .classes import Case
from .fields import HIDDEN
from .general import inputs
from .image_text import text_batch
from .labels import labels_for

MISMATCH = re.compile(r"tokens:? ?=?(\d+).{0,40}?features:? ?=?(\d+)", re.S)
Make = Callable[[int], Batch]
Loss = Callable[[Any, Batch], Any]


def fitting_batch(case: Case, model: Any, loss: Loss) -> Batch:
    """A batch whose loss the model gives.

    The task's own, where it has one; a model of images and texts that takes none of our images
    gets texts alone. Else one by the names of the forward's arguments, with the first labels that
    it accepts, or none.

    Raises:
        Exception: what the forward says, where it takes none: to the batch of a task, or without
            labels.
    """
    said: Exception | None = None
    for make in _candidates(case, model):
        try:
            return _fitted(make, model, loss)
        except Exception as error:
            said = said if case.task in MAKERS and said else error
    assert said is not None  # there is always a candidate
    raise said


def _candidates(case: Case, model: Any) -> Iterator[Make]:
    names = parameters_of(model)
    if case.task in MAKERS:
        yield lambda count: batch_for(case, model, count)
    if case.task == "image_text_to_text":
        yield lambda count: text_batch(model, names)
    for labels in labels_for(model, names, inputs(model, names, 4)):
        yield lambda count, labels=labels: inputs(model, names, count) | labels  # type: ignore[misc]


def _fitted(make: Make, model: Any, loss: Loss) -> Batch:
    """With as many tokens of an image as the model says that an image has features."""
    count = 4
    for _ in range(4):
        batch = make(count)
        try:
            loss(model, batch)
            return batch
        except (ValueError, RuntimeError, AssertionError) as error:
            found = MISMATCH.search(str(error))
            if found is None:
                raise
            tokens, features = (int(part) for part in found.groups())
            # some count the features' elements
            fitting = count // HIDDEN if tokens == features else count * features // max(tokens, 1)
            if fitting == count or not 1 <= fitting <= 1024:
                raise
            count = fitting
    raise ValueError("no number of image tokens fits the features of an image")
