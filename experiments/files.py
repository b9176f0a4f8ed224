"""Rows of CSV, TSV and JSON Lines files, read by the library `datasets`."""

from __future__ import annotations

import csv
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON = (".jsonl", ".json")
SUFFIXES = (*SEPARATORS, *JSON)
LONGER = "Length of header or names does not match"
"""How the warning begins that pandas gives where all rows are longer than the header."""

Row = dict[str, Any]


class DataError(ValueError):
    """The data asked for cannot be used; the message says which, and why."""


def read_rows(path: Path, *, quoted: bool = True) -> list[Row]:
    """The rows of a file, by column name, in the order of the file.

    Args:
        path: ends with one of `SUFFIXES`, and is UTF-8. CSV and TSV have a header, and their cells
            are all text; values of JSON keep their types, and a field that a row lacks is None.
        quoted: of CSV and TSV: whether quotation marks enclose cells, as spreadsheets write them,
            or are part of the text, as in GLUE.

    Raises:
        DataError: there is no such file, it is of another kind, damaged, or has no rows.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: the file must be one of {', '.join(SUFFIXES)}")
    if not path.read_bytes().strip():
        raise DataError(f"{path}: the file is empty")
    try:
        with _quietly(), tempfile.TemporaryDirectory() as cache:
            load = _json if path.suffix in JSON else _csv
            return list(load(path, quoted, cache_dir=cache, keep_in_memory=True).to_list())
    except DataError:
        raise
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise DataError(f"{path}: {_reason(error.__cause__ or error)}") from error


def _reason(error: BaseException) -> str:
    """Why a file could not be read, for the person who wrote it."""
    if isinstance(error, UnicodeDecodeError):
        return f"must be UTF-8 ({error})"
    if str(error).startswith(LONGER):
        return "the rows have more cells than the header: enclose texts in quotation marks"
    if "corresponds to no data" in str(error):
        return "the file has no rows"
    return str(error).strip().removeprefix("Error tokenizing data. C error: ")


def _json(path: Path, quoted: bool, **options: Any) -> Any:
    return datasets.Dataset.from_json(str(path), **options)


def _csv(path: Path, quoted: bool, **options: Any) -> Any:
    separator = SEPARATORS[path.suffix]
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    with path.open(encoding="utf-8-sig", newline="") as lines:
        cells = csv.reader(lines, delimiter=separator, quoting=quoting)
        first = next(row for row in cells if row)
        body = any(line.strip() for line in lines)
    # a column without a name is called what pandas calls it, such as the index that it writes
    header = [name or f"Unnamed: {place}" for place, name in enumerate(first)]
    if len(set(header)) < len(header):
        raise DataError(f"{path}: the header must not name a column twice, got {header}")
    if not body:
        raise DataError(f"{path}: there are no rows below the header {header}")
    return datasets.Dataset.from_csv(
        str(path),
        sep=separator,
        quoting=quoting,
        features=datasets.Features({name: datasets.Value("string") for name in header}),
        keep_default_na=False,  # or the texts "NA" and "null" would be lost
        index_col=False,  # or the first column would be, where all rows are longer than the header
        **options,
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars, no log; the warning of longer rows is an error."""
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", LONGER)
            yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
