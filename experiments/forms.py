"""How each task is put to a model: as a choice between texts, or as texts to be classified."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .choices import CHOICES, Choice, text_choice
from .classification import LAYOUTS, Example, Layout, text_layout
from .files import DataError, Row
from .own_data import OWN
from .tasks import TASKS

Form_ = TypeVar("Form_", Choice, Example)


@dataclass(frozen=True)
class Form:
    """A task as models see it.

    Attributes:
        task: its name.
        choice: what a causal language model chooses between, of a row.
        layout: what an encoder reads; None: it is not for encoders.
        scored: whether there is a right answer; else only the loss tells.
    """

    task: str
    choice: Callable[[Row], Choice]
    layout: Layout | None
    scored: bool = True

    def choices(self, rows: Iterable[Row]) -> list[Choice]:
        """For causal language models.

        Raises:
            DataError: a row has no form that the templates know, such as no blank in WinoGrande.
        """
        return [self._put(self.choice, row) for row in rows]

    def examples(self, rows: Iterable[Row]) -> list[Example]:
        """For encoders.

        Raises:
            DataError: as :meth:`choices`.
        """
        assert self.layout is not None
        return [self._put(self.layout.example, row) for row in rows]

    def _put(self, how: Callable[[Row], Form_], row: Row) -> Form_:
        try:
            return how(row)
        except (KeyError, ValueError) as error:
            raise DataError(f"{self.task}: no example in {row!r} ({error!r})") from None


FORMS = {
    name: Form(name, CHOICES[name], LAYOUTS.get(name), task.scored) for name, task in TASKS.items()
}


def own_form(labels: Sequence[str], template: str) -> Form:
    """Of a user's own texts and labels."""
    return Form(OWN, text_choice(labels, template), text_layout(labels))
