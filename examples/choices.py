"""Tasks as a choice between texts, for causal language models: SST-2, COPA, WinoGrande, WiC.

Templates, and the scoring of an option by the mean log-likelihood of its tokens, are those of MeZO
(Malladi et al. 2023, appendix E.2), which ZO-Bench follows. Files have the schemas of the data
sets' own releases (GLUE, SuperGLUE, WinoGrande 1.1, WiC).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tasks import DataError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

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


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: no JSON ({error})") from None


def _open(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return path.open(encoding="utf-8")


def _sst2_rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    with _open(folder / f"{'train' if split == 'train' else 'dev'}.tsv") as lines:
        names = next(lines).rstrip("\n").split("\t")
        for line in lines:
            row = dict(zip(names, line.rstrip("\n").split("\t"), strict=True))
            yield {**row, "label": int(row["label"])}


def _wic_rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    name = "train" if split == "train" else "dev"
    with _open(folder / f"{name}.data.txt") as data, _open(folder / f"{name}.gold.txt") as gold:
        for line, answer in zip(data, gold, strict=True):
            word, _, _, first, second = line.rstrip("\n").split("\t")
            label = int(answer.strip() == "T")
            yield {"word": word, "sentence1": first, "sentence2": second, "label": label}


@dataclass(frozen=True)
class Source:
    """How a task's rows are read from its files, and how one becomes a choice.

    Rows have the fields of the data set on the Hugging Face hub.
    """

    rows: Callable[[Path, str], Iterator[dict[str, Any]]]
    choice: Callable[[dict[str, Any]], Choice]


SOURCES = {
    "sst2": Source(_sst2_rows, lambda row: sst2(row["sentence"], row["label"])),
    "copa": Source(
        lambda folder, split: _rows(folder / f"{'train' if split == 'train' else 'val'}.jsonl"),
        lambda row: copa(
            row["premise"], (row["choice1"], row["choice2"]), row["question"], row["label"]
        ),
    ),
    "winogrande": Source(
        lambda folder, split: _rows(folder / f"{'train_m' if split == 'train' else 'dev'}.jsonl"),
        lambda row: winogrande(
            row["sentence"], (row["option1"], row["option2"]), int(row["answer"]) - 1
        ),
    ),
    "wic": Source(
        _wic_rows,
        lambda row: wic(row["word"], row["sentence1"], row["sentence2"], row["label"]),
    ),
}


def choices_from(task: str, rows: Iterable[dict[str, Any]]) -> list[Choice]:
    """Choices from rows, such as a split of the data set on the Hugging Face hub.

    Raises:
        DataError: a row is not in the task's schema.
        ValueError: an unknown task.
    """
    if task not in SOURCES:
        raise ValueError(f"task must be one of {tuple(SOURCES)}, got {task!r}")
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(SOURCES[task].choice(row))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{task}, row {number}: not in the schema ({error!r})") from None
    return found


def read_choices(task: str, folder: Path, split: str) -> list[Choice]:
    """All examples of a split, "train" or "dev", in file order.

    Raises:
        DataError: a file is missing or has another form.
        ValueError: an unknown task or split.
    """
    if task not in SOURCES:
        raise ValueError(f"task must be one of {tuple(SOURCES)}, got {task!r}")
    if split not in ("train", "dev"):
        raise ValueError(f"split must be 'train' or 'dev', got {split!r}")
    return choices_from(task, SOURCES[task].rows(folder, split))


def protocol(
    task: str, folder: Path, seed: int, train: int = 1000, dev: int = 100, test: int = 1000
) -> tuple[list[Choice], list[Choice], list[Choice]]:
    """MeZO's protocol: training and development examples from the training split, test from dev.

    Drawn without replacement by ``seed``; as many as there are where a split is smaller.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(examples: list[Choice], count: int) -> list[Choice]:
        order = torch.randperm(len(examples), generator=generator).tolist()
        return [examples[i] for i in order[:count]]

    pool = drawn(read_choices(task, folder, "train"), train + dev)
    held_out = min(dev, len(pool) // 2)
    tests = drawn(read_choices(task, folder, "dev"), test)
    return pool[held_out:], pool[:held_out], tests


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

    @torch.no_grad()
    def accuracy(self, model: nn.Module, batch_size: int = 16) -> float:
        """Share of examples whose right option has the highest mean log-likelihood."""
        training = model.training
        model.eval()
        rows = [option for options in self.options for option in options]
        found: list[float] = []
        for start in range(0, len(rows), batch_size):
            batch = self._padded(rows[start : start + batch_size])
            found += mean_log_likelihood(model, batch).tolist()
        model.train(training)
        scores, right = iter(found), 0
        for options, label in zip(self.options, self.labels, strict=True):
            own = [next(scores) for _ in options]
            right += own.index(max(own)) == label
        return right / len(self)


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
    """What is trained: minus the mean over rows of :func:`mean_log_likelihood`."""
    return -mean_log_likelihood(model, batch).mean()
