"""How well a model does on a set of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.metrics import accuracy_score, f1_score


@dataclass(frozen=True)
class Scores:
    """Mean loss; accuracy and macro-averaged F1, both from 0 to 1."""

    loss: float
    accuracy: float
    f1: float


def scores(chosen: Sequence[int], labels: Sequence[int], loss: float) -> Scores:
    """Scores of the chosen labels; F1 is the mean over all labels that occur."""
    accuracy = float(accuracy_score(labels, chosen))
    return Scores(loss, accuracy, float(f1_score(labels, chosen, average="macro")))
