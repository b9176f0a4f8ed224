"""Tasks as a choice between texts, for causal language models.

Templates, and the scoring of an option by the mean log-likelihood of its tokens, are those of MeZO
(Malladi et al. 2023, appendix E.2), which ZO-Bench follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .files import Row
from .scores import Scores, scores

MAX_LENGTH = 256
IGNORED = -100


@dataclass(frozen=True)
class Choice:
    """Options as (prompt, continuation); the continuation is scored, and trained on if right."""

    options: tuple[tuple[str, str], ...]
    label: int


def sst2(sentence: str, label: int) -> Choice:
    prompt = f"{sentence.strip()} It was"
    return Choice(((prompt, " terrible"), (prompt, " great")), label)


def copa(premise: str, choices: Sequence[str], question: str, label: int) -> Choice:
    link = {"cause": "because", "effect": "so"}[question]
    prompt = f"{premise.rstrip().rstrip('.')} {link}"
    lowered = [" " + _lower_first(choice) for choice in choices]
    return Choice(tuple((prompt, choice) for choice in lowered), label)


def _lower_first(text: str) -> str:
    """ "The sun" to "the sun"; "I" stays."""
    word = text.split(" ", 1)[0]
    return text if word == "I" or word.startswith("I'") else text[:1].lower() + text[1:]


def winogrande(sentence: str, options: Sequence[str], label: int) -> Choice:
    before, after = sentence.split("_")
    return Choice(tuple((before + option, after) for option in options), label)


def wic(word: str, first: str, second: str, label: int) -> Choice:
    prompt = (
        f'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        f"{first}\n{second}\n"
    )
    return Choice(((prompt, "No"), (prompt, "Yes")), label)


CHOICES: dict[str, Callable[[Row], Choice]] = {
    "sentiment": lambda row: sst2(row["sentence"], row["label"]),
    "sst2": lambda row: sst2(row["sentence"], row["label"]),
    "sst2-sentences": lambda row: Choice((("", row["sentence"].strip()),), 0),
    "copa": lambda row: copa(
        row["premise"], (row["choice1"], row["choice2"]), row["question"], row["label"]
    ),
    "winogrande": lambda row: winogrande(
        row["sentence"], (row["option1"], row["option2"]), row["label"]
    ),
    "wic": lambda row: wic(row["word"], row["sentence1"], row["sentence2"], row["label"]),
}


def text_choice(labels: Sequence[str], template: str) -> Callable[[Row], Choice]:
    """Texts with labels: the template's prompt, with the name of each label after it."""

    def choice(row: Row) -> Choice:
        prompt = template.format(text=row["text"].strip(), pair=row.get("pair", "").strip())
        return Choice(tuple((prompt, f" {label}") for label in labels), row["label"])

    return choice


class ChoiceData:
    """Choices as tokens; batches for the language-modelling loss and for scoring."""

    def __init__(
        self,
        choices: Sequence[Choice],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = MAX_LENGTH,
    ) -> None:
        self.labels = [choice.label for choice in choices]
        self.options = [
            [_encode(tokenizer, prompt, text, max_length) for prompt, text in choice.options]
            for choice in choices
        ]
        self.lengths = [max(len(ids) for ids, _ in options) for options in self.options]
        self._padding = tokenizer.pad_token_id or 0

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The right options, (rows, longest row): labels are the tokens of the continuation."""
        return self._padded([self.options[i][self.labels[i]] for i in indices])

    def _padded(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), length), self._padding)
        labels = torch.full((len(rows), length), IGNORED)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for row, (tokens, count) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, len(tokens) - count : len(tokens)] = torch.tensor(tokens[-count:])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of each example, minus its :func:`mean_log_likelihood`; their mean is trained."""
        return -mean_log_likelihood(model, batch)

    @torch.no_grad()
    def score(self, model: nn.Module, first: int | None = None, batch_size: int = 32) -> Scores:
        """Of the (first) examples; chosen is the option of the highest mean log-likelihood."""
        training = model.training
        model.eval()
        options = self.options[:first]
        rows = sorted((row for own in options for row in own), key=_length)
        found: dict[int, float] = {}
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            values = mean_log_likelihood(model, self._padded(part)).tolist()
            found.update(zip(map(id, part), values, strict=True))
        model.train(training)
        logits = [[found[id(row)] for row in own] for own in options]
        right = [own[label] for own, label in zip(logits, self.labels, strict=False)]
        chosen = [own.index(max(own)) for own in logits]
        return scores(chosen, self.labels[:first], -sum(right) / len(right))

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, first: int | None = None, batch_size: int = 32) -> float:
        """Of the (first) examples' right options, without dropout."""
        training = model.training
        model.eval()
        pairs = zip(self.options[:first], self.labels, strict=False)
        rows = sorted((own[label] for own, label in pairs), key=_length)
        total = 0.0
        for start in range(0, len(rows), batch_size):
            batch = self._padded(rows[start : start + batch_size])
            total -= float(mean_log_likelihood(model, batch).sum())
        model.train(training)
        return total / len(rows)


def _length(row: tuple[list[int], int]) -> int:
    return len(row[0])


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, max_length: int
) -> tuple[list[int], int]:
    """Tokens of prompt and continuation, and how many are the latter's; cut at the left."""
    whole = tokenizer(prompt + text)["input_ids"]
    count = len(whole) - len(tokenizer(prompt)["input_ids"])
    count = min(max(count, 1), max_length - 1, len(whole) - 1)
    return whole[-max_length:], count


def mean_log_likelihood(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean log-probability of each row's labelled tokens, shape (rows,), fp32."""
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(
        logits[:, -batch["labels"].shape[1] :][:, :-1].float().transpose(1, 2),
        targets,
        reduction="none",
        ignore_index=IGNORED,
    )
    return -losses.sum(1) / (targets != IGNORED).sum(1)


def option_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Minus the mean over rows of :func:`mean_log_likelihood`."""
    return -mean_log_likelihood(model, batch).mean()
