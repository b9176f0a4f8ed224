"""What the grids of several studies have in common: one study a model, runs in folders by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from .models import ModelError


class OfAModel(Protocol):
    """A study that is of one model."""

    @property
    def model(self) -> str:
        """A part of its name."""


S = TypeVar("S", bound=OfAModel)


def study_among(studies: Iterable[S], model: str, rule: str = "--models must be of") -> S:
    """The study of a model; ``rule`` begins the message where there is none.

    Raises:
        ModelError: none is of this model.
    """
    studies = list(studies)
    for study in studies:
        if study.model in model.lower():
            return study
    raise ModelError(f"{rule} {', '.join(study.model for study in studies)}, got {model!r}")


def folder_of(name: str) -> str:
    """A cell's name as that of a folder."""
    return name.replace(" + ", "+").replace(", ", "-").replace(" ", "-")
