"""The classes of the installed transformers, from the mappings of its auto classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

TASKS = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq_lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question_answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "image_classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "image_text_to_text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "audio_classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
"""Names in ``transformers.models.auto.modeling_auto``. A class of several counts for the first
that is not ``causal_lm``, where images would be left out of an image-text model."""


class Case(NamedTuple):
    """A class of a task, and the kind of model whose configuration makes it."""

    name: str
    task: str
    model_type: str


def all_cases() -> dict[str, Case]:
    """Every distinct class of the mappings of `TASKS`, by its name, in their order."""
    found: dict[str, Case] = {}
    for task in TASKS:
        for model_type, name in _pairs(task):
            known = found.get(name)
            if known is None or (known.task, task) == ("causal_lm", "image_text_to_text"):
                found[name] = Case(name, task, model_type)
    return found


def _pairs(task: str) -> Iterator[tuple[str, str]]:
    for model_type, names in getattr(modeling_auto, TASKS[task], {}).items():
        for name in [names] if isinstance(names, str) else names:
            if model_type in CONFIG_MAPPING:
                yield model_type, name


def class_of(case: Case) -> Any:
    """The class itself; its module is imported."""
    import transformers

    return getattr(transformers, case.name)
