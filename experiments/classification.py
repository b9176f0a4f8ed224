"""The tasks for encoders: one text or a pair, classified; or options, each with a score.

SST-2, WiC and a user's own texts are classified. COPA and WinoGrande are multiple choice, as is
usual for encoders: a row of text for each option, one score a row, a softmax over an example's
options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from .files import Row
from .scores import Scores, scores

MAX_LENGTH = 128
Batch = dict[str, Tensor]
Texts = tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """One row of texts (to be classified), or one a choice; and the label."""

    rows: tuple[Texts, ...]
    label: int


@dataclass(frozen=True)
class Layout:
    """How a task is put to an encoder.

    Attributes:
        example: the rows of text in a row of data.
        outputs: logits of a row of text: the number of labels, or 1 for an option's score.
        label_names: of the labels, or of the options.
        prompts: sentences typical of each label, for a head that needs no training.
    """

    example: Callable[[Row], Example]
    outputs: int
    label_names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...] = ()


def _sentence(row: Row) -> Example:
    return Example(((row["sentence"].strip(),),), row["label"])


def _wic(row: Row) -> Example:
    return Example(((f"{row['word']}: {row['sentence1']}", row["sentence2"]),), row["label"])


def _copa(row: Row) -> Example:
    asked = {"cause": "What was the cause?", "effect": "What happened as a result?"}
    question = f"{row['premise']} {asked[row['question']]}"
    return Example(tuple((question, row[c]) for c in ("choice1", "choice2")), row["label"])


def _winogrande(row: Row) -> Example:
    before, after = row["sentence"].split("_")
    options = (row["option1"], row["option2"])
    return Example(tuple((before.strip(), option + after) for option in options), row["label"])


_SENTIMENT = Layout(
    _sentence,
    outputs=2,
    label_names=("negative", "positive"),
    prompts=(
        (
            "It was terrible.",
            "I hated it.",
            "A boring, awful film.",
            "This is dreadful and dull.",
            "negative review",
            "bad",
            "I really disliked this.",
        ),
        (
            "It was great.",
            "I loved it.",
            "A wonderful, brilliant film.",
            "This is excellent and delightful.",
            "positive review",
            "good",
            "I really enjoyed this.",
        ),
    ),
)
LAYOUTS: dict[str, Layout] = {
    "sentiment": _SENTIMENT,
    "sst2": _SENTIMENT,
    "wic": Layout(_wic, outputs=2, label_names=("different", "same")),
    "copa": Layout(_copa, outputs=1, label_names=("choice1", "choice2")),
    "winogrande": Layout(_winogrande, outputs=1, label_names=("option1", "option2")),
}


def text_layout(labels: Sequence[str]) -> Layout:
    """Texts, or pairs of texts, with labels."""

    def example(row: Row) -> Example:
        texts = (row["text"].strip(), *([row["pair"].strip()] if "pair" in row else []))
        return Example((texts,), row["label"])

    return Layout(example, outputs=len(labels), label_names=tuple(labels))


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """One row an example, in float32 whatever the weights are, for the sake of differences."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    found: Tensor = model(**inputs).logits
    return found.float().reshape(len(batch["labels"]), -1)


def classification_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy of each example."""
    found = logits(model, batch)
    return nn.functional.cross_entropy(found, batch["labels"], reduction="none")


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over examples."""
    return classification_losses(model, batch).mean()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> Scores:
    """Scores over the batches, without dropout."""
    training = model.training
    model.eval()
    chosen: list[int] = []
    labels: list[int] = []
    loss = 0.0
    for batch in batches:
        found = logits(model, batch)
        loss += float(nn.functional.cross_entropy(found, batch["labels"], reduction="sum"))
        chosen += found.argmax(-1).tolist()
        labels += batch["labels"].tolist()
    model.train(training)
    return scores(chosen, labels, loss / len(labels))


class Encoded:
    """Examples tokenised once; batches are padded to their longest row by the collator."""

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        max_length: int = MAX_LENGTH,
    ) -> None:
        columns = zip(*(texts for example in examples for texts in example.rows), strict=True)
        encoding = tokenizer(
            *(list(column) for column in columns), truncation=True, max_length=max_length
        )
        rows = iter(range(len(encoding["input_ids"])))
        self.rows: list[list[dict[str, Any]]] = [
            [
                {key: encoding[key][i] for key in encoding}
                for _, i in zip(example.rows, rows, strict=False)
            ]
            for example in examples
        ]
        self.labels = [example.label for example in examples]
        self.lengths = [max(len(row["input_ids"]) for row in own) for own in self.rows]
        self._collate = DataCollatorWithPadding(tokenizer)
        self._device = device

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Padded tensors (rows, longest row) on the device, with `labels` (examples,)."""
        batch = self._collate([row for i in indices for row in self.rows[i]])
        labels = torch.tensor([self.labels[i] for i in indices])
        return {key: value.to(self._device) for key, value in {**batch, "labels": labels}.items()}

    def fixed_batches(self, size: int, first: int | None = None) -> list[Batch]:
        """The first examples in batches of similar length: little padding, quick to evaluate."""
        indices = sorted(range(len(self))[:first], key=self.lengths.__getitem__)
        return [self.batch(indices[i : i + size]) for i in range(0, len(indices), size)]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of each example; their mean is trained: :func:`classification_losses`."""
        return classification_losses(model, batch)

    def score(self, model: nn.Module, first: int | None = None, batch_size: int = 32) -> Scores:
        """Of the (first) examples."""
        return evaluate(model, self.fixed_batches(batch_size, first))

    def mean_loss(self, model: nn.Module, first: int | None = None) -> float:
        """Of the (first) examples."""
        return self.score(model, first).loss
