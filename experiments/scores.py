"""How well a model does on a set of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """Mean loss; accuracy and macro-averaged F1, both from 0 to 1."""

    loss: float
    accuracy: float
    f1: float


def scores(chosen: Sequence[int], labels: Sequence[int], loss: float) -> Scores:
    """Scores of the chosen labels; F1 is the mean over all labels that occur."""
    pairs = list(zip(chosen, labels, strict=True))
    accuracy = sum(a == b for a, b in pairs) / len(pairs)
    each = []
    for label in sorted({*chosen, *labels}):
        both = sum(a == b == label for a, b in pairs)
        each.append(2 * both / sum((a == label) + (b == label) for a, b in pairs))
    return Scores(loss, accuracy, sum(each) / len(each))
