"""The tasks' examples as rows, from files or the Hugging Face hub, and MeZO's split of them.

A row is a dictionary with the fields of the data set on the hub; `label` is 0 or 1. Files have the
form of the data sets' own releases (GLUE, SuperGLUE, WinoGrande 1.1, WiC). What a model sees of a
row is in `choices.py` (causal language models) and `classification.py` (encoders); a user's own
texts and labels are the task of `own_data.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .files import DataError, Row, read_rows

DEMO_DATA = Path(__file__).resolve().parent / "data"
HUB = "hub"
TRAIN, DEV, TEST = 1000, 100, 1000
"""Sizes of MeZO's protocol (Malladi et al. 2023)."""


@dataclass(frozen=True)
class Task:
    """Where a task's rows come from.

    Attributes:
        fields: what a row must have beside its label; they hold text.
        labels: the label as it stands in the data, and what it means here.
        read: makes rows of the files in a folder, by split ("train" or "dev").
        hub: arguments of `datasets.load_dataset`.
        label: name of the field that holds the label.
        scored: whether it has a right answer; else only the loss tells.
    """

    fields: tuple[str, ...]
    labels: Mapping[Any, int]
    read: Callable[[Path, str], Iterator[tuple[str, Row]]]
    hub: tuple[str, ...]
    label: str = "label"
    scored: bool = True


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8 ({error})") from None


def _tsv(folder: Path, split: str) -> Iterator[tuple[str, Row]]:
    path = folder / f"{split}.tsv"
    if not path.is_file():
        raise DataError(f"{path}: no such file; other files need --task text-classification")
    rows = read_rows(path, quoted=False)
    if not {"sentence", "label"} <= set(rows[0]):
        raise DataError(f"{path}: the header must name sentence and label, got {list(rows[0])}")
    yield from _named(path, rows)


def _jsonl(train: str, dev: str) -> Callable[[Path, str], Iterator[tuple[str, Row]]]:
    def read(folder: Path, split: str) -> Iterator[tuple[str, Row]]:
        path = folder / (train if split == "train" else dev)
        yield from _named(path, read_rows(path))

    return read


def _named(path: Path, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _wic(folder: Path, split: str) -> Iterator[tuple[str, Row]]:
    data, gold = folder / f"{split}.data.txt", folder / f"{split}.gold.txt"
    lines, answers = _lines(data), _lines(gold)
    if len(lines) != len(answers):
        raise DataError(f"{gold}: {len(lines)} answers expected, got {len(answers)}")
    for number, (line, answer) in enumerate(zip(lines, answers, strict=True), start=1):
        cells, where = line.split("\t"), f"{data}, line {number}"
        if len(cells) != 5:
            raise DataError(f"{where}: 5 cells expected, got {len(cells)}")
        row = {"word": cells[0], "sentence1": cells[3], "sentence2": cells[4]}
        yield where, {**row, "label": {"F": 0, "T": 1}.get(answer.strip(), answer)}


_BINARY = {0: 0, 1: 1, "0": 0, "1": 1}
_SST2 = Task(("sentence",), _BINARY, _tsv, ("stanfordnlp/sst2",))
TASKS: dict[str, Task] = {
    "sentiment": _SST2,
    "sst2": _SST2,
    "sst2-sentences": Task(_SST2.fields, _BINARY, _tsv, _SST2.hub, scored=False),
    "copa": Task(
        ("premise", "choice1", "choice2", "question"),
        _BINARY,
        _jsonl("train.jsonl", "val.jsonl"),
        ("aps/super_glue", "copa"),
    ),
    "winogrande": Task(
        ("sentence", "option1", "option2"),
        {"1": 0, "2": 1},
        _jsonl("train_m.jsonl", "dev.jsonl"),
        ("allenai/winogrande", "winogrande_m"),
        label="answer",
    ),
    "wic": Task(("word", "sentence1", "sentence2"), _BINARY, _wic, ("aps/super_glue", "wic")),
}
"""`sentiment` is the demo data, in the form of SST-2; `sst2-sentences` models SST-2's sentences."""


def checked(task: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Row]:
    """Rows of the task, the label as 0 or 1.

    Raises:
        DataError: a row lacks a field, or has an unknown label; named by where it comes from.
    """
    found, needed = [], TASKS[task]
    for where, row in rows:
        for field in needed.fields:
            if not isinstance(row.get(field), str):
                raise DataError(f"{where}: {task} needs the text {field!r}, got {row.get(field)!r}")
        label = row.get(needed.label)
        if not isinstance(label, int | str) or label not in needed.labels:
            known = sorted({str(known) for known in needed.labels})
            raise DataError(f"{where}: {needed.label} must be one of {known}, got {label!r}")
        found.append({**row, "label": needed.labels[label]})
    return found


def read(task: str, source: str | Path, split: str) -> list[Row]:
    """All rows of a split, "train" or "dev", in the order of the data.

    Args:
        task: a name in `TASKS`.
        source: a folder with the task's files, or with a folder of the task's name; or "hub".
        split: "train", or "dev", which is what the hub calls validation.

    Raises:
        DataError: something is missing or has another form.
        ValueError: an unknown task or split.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {tuple(TASKS)}, got {task!r}")
    if split not in ("train", "dev"):
        raise ValueError(f"split must be 'train' or 'dev', got {split!r}")
    if str(source) == HUB:
        return checked(task, _from_hub(task, split))
    folder = Path(source)
    for name in (task, task.split("-")[0]):
        if (folder / name).is_dir():
            folder = folder / name
    if folder.is_file():
        raise DataError(
            f"{folder}: a file, where {task} has a folder; other files need --task "
            "text-classification"
        )
    if not folder.is_dir():
        raise DataError(f"{folder}: no such file or folder")
    return checked(task, TASKS[task].read(folder, split))


def _from_hub(task: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from datasets import load_dataset

    try:
        data = load_dataset(*TASKS[task].hub, split="train" if split == "train" else "validation")
    except (OSError, ValueError) as error:
        raise DataError(f"{'/'.join(TASKS[task].hub)}: cannot be loaded ({error})") from error
    for number, row in enumerate(data, start=1):
        yield f"{task}, row {number}", row


def default_source(task: str) -> Path:
    """The demo data, or the folder that the environment variable ZOFO_DATA names."""
    if task == "sentiment":
        return DEMO_DATA
    if not os.environ.get("ZOFO_DATA"):
        raise DataError(
            f"the data of {task} must be named: by --data FOLDER, by --data hub, or by the "
            "environment variable ZOFO_DATA"
        )
    return Path(os.environ["ZOFO_DATA"])


class Parts(NamedTuple):
    """Rows by what they are for."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]


def protocol(
    task: str, source: str | Path, seed: int, train: int = TRAIN, dev: int = DEV, test: int = TEST
) -> Parts:
    """MeZO's protocol: training and development rows from the training split, test from dev.

    Drawn without replacement by ``seed``. A training split that is too small for both (COPA has
    400 rows) is used up: development takes its number, at most half.

    Raises:
        DataError: as `read`; or the training rows have one label only.
    """
    draw = Draw(seed)
    pool = draw(read(task, source, "train"), train + dev)
    held_out = dev if len(pool) == train + dev else min(dev, len(pool) // 2)
    tests = draw(read(task, source, "dev"), test)
    parts = Parts(pool[held_out:], pool[:held_out], tests)
    check_parts(source, parts, labelled=TASKS[task].scored)
    return parts


class Draw:
    """Draws rows without replacement, in an order that the seed decides."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: Sequence[Row], count: int | None = None) -> list[Row]:
        order = torch.randperm(len(rows), generator=self._generator).tolist()
        return [rows[i] for i in order[:count]]


def check_parts(source: str | Path, parts: Parts, labelled: bool) -> None:
    """Each part must have rows, and the training rows two labels where they are learned."""
    for name, rows in zip(("training", "development", "test"), parts, strict=True):
        if not rows:
            raise DataError(f"{source}: no {name} examples")
    if labelled and len({row["label"] for row in parts.train}) < 2:
        raise DataError(
            f"{source}: the {len(parts.train)} training examples must have two labels, got one"
        )
