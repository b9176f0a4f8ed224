"""What texts are scored by: functions of the texts alone, which have no gradient."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

from ..forms import FORMS
from ..heads import set_head
from ..models import DEFAULT_MODEL_PACKAGE, Problem, load_problem
from ..tasks import DEV, TEST, default_source, protocol

PROMPT = "Once upon a time"
"""What all texts begin with."""
LETTER = "s"
LEAST_WORDS = 4
"""Of a sentence that counts as one."""
PROBE_EXAMPLES = 4000

Score = Callable[[Sequence[str]], list[float]]
"""From texts, their prompts included, to a score each; larger is better."""

_WORD = re.compile(r"[A-Za-z']+")
_SENTENCE = re.compile(r"[^.!?]*[.!?]")


def style(texts: Sequence[str]) -> list[float]:
    """The share of the words after the prompt that begin with :data:`LETTER`; 0 without words."""
    shares = []
    for text in texts:
        words = _WORD.findall(text.removeprefix(PROMPT).lower())
        shares.append(sum(word.startswith(LETTER) for word in words) / max(len(words), 1))
    return shares


def two_sentences(texts: Sequence[str]) -> list[float]:
    """1 for a text of exactly two whole sentences of at least :data:`LEAST_WORDS` words, else 0.

    A sentence is what ends with ``.``, ``!`` or ``?``; nothing may follow the second one.
    """
    return [float(all(_parts(text.strip()))) for text in texts]


def nearly_two_sentences(texts: Sequence[str]) -> list[float]:
    """The share of what :func:`two_sentences` asks for: two sentences; long ones; a whole end."""
    return [sum(_parts(text.strip())) / 3 for text in texts]


def _parts(text: str) -> tuple[bool, bool, bool]:
    found = _SENTENCE.findall(text)
    long = [len(_WORD.findall(sentence)) >= LEAST_WORDS for sentence in found]
    return len(found) == 2, bool(found) and all(long), len("".join(found)) == len(text) > 0


class Negative:
    """The probability that a text is negative, by an encoder's probe on SST-2.

    Args:
        data: folder of SST-2, or ``"hub"``; None: in the environment variable ZOFO_DATA.
        examples: that the probe is fitted on.

    Raises:
        DataError: the data is not there.
        ModelError: MiniLM's package is not installed.
    """

    def __init__(self, data: str | None = None, examples: int = PROBE_EXAMPLES) -> None:
        source = data or str(default_source("sst2"))
        self.problem: Problem = load_problem(
            DEFAULT_MODEL_PACKAGE,
            FORMS["sst2"],
            protocol("sst2", source, 0, examples, DEV, TEST),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        set_head(self.problem, "probe")

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        encoded = self.problem.tokenizer(list(texts), padding=True, return_tensors="pt")
        found: list[float] = self.problem.base(**encoded).logits.softmax(-1)[:, 0].tolist()
        return found


SCORES: dict[str, Callable[[str | None], Score]] = {
    "style": lambda data: style,
    "format": lambda data: two_sentences,
    "graded-format": lambda data: nearly_two_sentences,
    "sentiment": Negative,
}
"""By name: what makes a score, of the folder with the data that it needs."""
