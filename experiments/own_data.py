"""The task of a user's own texts: CSV, TSV or JSON Lines, labels of any number and kind.

One file is split into training, development and test examples. A folder holds `train`, perhaps
`dev` and `test`, each with one of the suffixes of `files.py`; what is missing is split off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .files import SUFFIXES, DataError, Row, read_rows
from .tasks import Draw, Parts, check_parts

OWN = "text-classification"
"""Name of the task."""

NAMES = {
    "train": ("train", "training"),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test",),
}
"""What the files in a folder may be called, without their suffix."""

MANY = 20
"""More labels than this must be repeated, or they are no classes."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns: a text, perhaps a second one that belongs to it, and the label."""

    text: str = "text"
    pair: str | None = None
    label: str = "label"


class OwnData(NamedTuple):
    """The parts, of rows with `text`, perhaps `pair`, and `label`; and what each label is called.

    `label` is a place in `labels`.
    """

    parts: Parts
    labels: tuple[str, ...]


def load(
    source: str | Path, columns: Columns, seed: int, train: int, dev: int, test: int
) -> OwnData:
    """Examples and labels of a file or folder.

    Labels are those of the training file, numbers by size and texts by alphabet.

    Args:
        source: a file, or a folder with at least a training file.
        columns: what of a row is the text and the label.
        seed: draws the examples.
        train, dev, test: sizes, at most. What has no file of its own is split off the training
            file: at most a fifth of it for the test, and a tenth for development.

    Raises:
        DataError: there are no such files or columns; a text or label is missing; the label is no
            class; a label has no training example, or is unknown there.
    """
    files = _files(Path(source))
    rows = {split: _read(path, columns) for split, path in files.items()}
    labels = label_names(files["train"], [row["label"] for row in rows["train"]])
    for split, path in files.items():
        _to_places(path, rows[split], labels)
    parts = _split(rows, Draw(seed), train, dev, test)
    check_parts(source, parts, labelled=True)
    lost = [name for i, name in enumerate(labels) if i not in {row["label"] for row in parts.train}]
    if lost:
        raise DataError(
            f"{source}: every label must be among the {len(parts.train)} training examples drawn, "
            f"not so {lost[:5]}: give more examples of it, or another --data-seed"
        )
    return OwnData(parts, labels)


def _files(source: Path) -> dict[str, Path]:
    if source.is_file():
        return {"train": source}
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder")
    found = {}
    for split, names in NAMES.items():
        there = [source / (n + suffix) for n in names for suffix in SUFFIXES]
        there = [path for path in there if path.is_file()]
        if len(there) > 1:
            raise DataError(f"{source}: {there[0].name} and {there[1].name} must not both be there")
        if there:
            found[split] = there[0]
    if "train" not in found:
        kinds = ", ".join(f"train{suffix}" for suffix in SUFFIXES)
        raise DataError(f"{source}: the folder must hold one of {kinds}")
    return found


def _read(path: Path, columns: Columns) -> list[Row]:
    """Rows with `text`, perhaps `pair`, and `label` as text."""
    found = []
    named = {"text": columns.text, "label": columns.label}
    if columns.pair is not None:
        named["pair"] = columns.pair
    for number, row in enumerate(read_rows(path), start=1):
        for what, name in named.items():
            if name not in row:
                raise DataError(
                    f"{path}: there must be a column {name!r}, got {list(row)}: name yours "
                    f"by {FLAGS[what]}"
                )
        values = {what: row[name] for what, name in named.items()}
        for what in values.keys() - {"label"}:
            if not isinstance(values[what], str) or not values[what].strip():
                raise DataError(
                    f"{path}, row {number}: {named[what]!r} must be a text, got {values[what]!r}"
                )
        label = values["label"]
        if not isinstance(label, str | int | float) or not str(label).strip():
            raise DataError(
                f"{path}, row {number}: {columns.label!r} must be a text or a number, got {label!r}"
            )
        found.append({**values, "label": str(label).strip()})
    return found


FLAGS = {"text": "--text-column", "pair": "--pair-column", "label": "--label-column"}


def label_names(path: Path, labels: Sequence[str]) -> tuple[str, ...]:
    """The labels that occur, in order.

    Raises:
        DataError: they are no classes, as most occur once.
    """
    names = sorted(set(labels))
    if len(names) > MANY and 2 * len(names) > len(labels):
        raise DataError(
            f"{path}: labels must be classes, got {len(names)} different ones in {len(labels)} "
            f"rows, such as {names[0]!r}"
        )
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(names)


def _to_places(path: Path, rows: Iterable[Row], labels: Sequence[str]) -> None:
    places = {name: place for place, name in enumerate(labels)}
    for number, row in enumerate(rows, start=1):
        if row["label"] not in places:
            raise DataError(
                f"{path}, row {number}: the label {row['label']!r} must be one of the training "
                f"file's, {list(labels)[:10]}"
            )
        row["label"] = places[row["label"]]


def _split(rows: dict[str, list[Row]], draw: Draw, train: int, dev: int, test: int) -> Parts:
    pool = draw(rows["train"])
    parts = {}
    whole = len(pool)
    for split, most, part in (("test", test, 5), ("dev", dev, 10)):
        if split in rows:
            parts[split] = draw(rows[split], most)
        else:
            count = min(most, max(whole // part, 1))
            parts[split], pool = pool[:count], pool[count:]
    return Parts(pool[:train], parts["dev"], parts["test"])
