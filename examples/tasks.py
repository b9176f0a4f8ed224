"""Text classification data for `finetune.py`: read, tokenise once, shuffle, batch.

A task is a name for a table layout. Every file is tab-separated with a header line; text columns
and the integer label column are named by the task. Add a task by adding a line to `TASKS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

MAX_LENGTH = 64
SPLIT_SEED = 0
SPLIT_FRACTION = 0.2


class DataError(ValueError):
    """The data asked for cannot be used; the message says which file, and why."""


@dataclass(frozen=True)
class Task:
    """The layout of a task's files: which columns hold the text, what the labels mean."""

    text: tuple[str, ...]
    label: str
    label_names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...] = ()
    """Sentences typical of each label, for a head that needs no training."""


SENTIMENT = Task(
    text=("sentence",),
    label="label",
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
TASKS: dict[str, Task] = {"sentiment": SENTIMENT, "sst2": SENTIMENT}


@dataclass(frozen=True)
class Example:
    text: tuple[str, ...]
    label: int


def read_tsv(path: Path, task: Task) -> list[Example]:
    """All examples of one file, in file order."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[0].split("\t") if lines else []
    missing = [name for name in (*task.text, task.label) if name not in header]
    if missing:
        raise DataError(f"{path}: the header must name the columns {missing}, got {header}")
    texts, label = [header.index(name) for name in task.text], header.index(task.label)
    known = {str(i): i for i in range(len(task.label_names))}
    examples = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) != len(header):
            raise DataError(
                f"{path}, line {number}: {len(header)} cells expected, got {len(cells)}"
            )
        if cells[label] not in known:
            raise DataError(
                f"{path}, line {number}: the label must be one of {list(known)}, "
                f"got {cells[label]!r}"
            )
        examples.append(Example(tuple(cells[i].strip() for i in texts), known[cells[label]]))
    return examples


def load_examples(
    data: Path, task: Task, train_size: int | None = None, dev_size: int | None = None
) -> tuple[list[Example], list[Example]]:
    """Training and dev examples, the first `train_size` and `dev_size` of each.

    A folder holds `train.tsv` and `dev.tsv`. A single file is shuffled with a fixed seed and cut in
    two: the same file always gives the same split, whatever `--seed` says.
    """
    if data.is_dir():
        train, dev = read_tsv(data / "train.tsv", task), read_tsv(data / "dev.tsv", task)
    elif data.is_file():
        examples = read_tsv(data, task)
        order = torch.randperm(
            len(examples), generator=torch.Generator().manual_seed(SPLIT_SEED)
        ).tolist()
        cut = dev_size if dev_size is not None else round(SPLIT_FRACTION * len(examples))
        if cut >= len(examples):
            raise DataError(f"{data}: cannot set {cut} of {len(examples)} examples aside for dev")
        dev = [examples[i] for i in order[:cut]]
        train = [examples[i] for i in order[cut:]]
    else:
        raise DataError(f"{data}: neither a file nor a folder with train.tsv and dev.tsv")
    train, dev = train[:train_size], dev[:dev_size]
    if len({example.label for example in train}) < 2:
        raise DataError(f"{data}: the {len(train)} training examples must hold two labels or more")
    if not dev:
        raise DataError(f"{data}: no dev examples")
    return train, dev


class Encoded:
    """Examples tokenised once; batches are padded to their longest row by the collator."""

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        columns = zip(*(example.text for example in examples), strict=True)
        encoding = tokenizer(
            *(list(column) for column in columns), truncation=True, max_length=MAX_LENGTH
        )
        self.rows: list[dict[str, Any]] = [
            {**{key: encoding[key][i] for key in encoding}, "label": example.label}
            for i, example in enumerate(examples)
        ]
        self.lengths = [len(row["input_ids"]) for row in self.rows]
        self._collate = DataCollatorWithPadding(tokenizer)
        self._device = device

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Padded tensors (rows, longest row) on the device, with `labels` (rows,)."""
        batch = self._collate([self.rows[i] for i in indices])
        return {key: value.to(self._device) for key, value in batch.items()}

    def fixed_batches(self, size: int, first: int | None = None) -> list[dict[str, Tensor]]:
        """The first examples in batches of similar length: little padding, quick to evaluate."""
        indices = sorted(range(len(self))[:first], key=self.lengths.__getitem__)
        return [self.batch(indices[i : i + size]) for i in range(0, len(indices), size)]


def shuffled_batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Random reshuffling without end: every example once an epoch, a new order every epoch.

    Depends on its arguments only, so all methods of a seed see the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        yield from (order[i : i + size] for i in range(0, count, size))


def fingerprint(batches: Sequence[Sequence[int]]) -> str:
    """A short hash of the examples seen, in order: equal for runs that saw the same data."""
    return hashlib.sha256(repr([list(batch) for batch in batches]).encode()).hexdigest()[:16]
