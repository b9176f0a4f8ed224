"""The page of architectures has the counts of the committed results."""

import json
import re

import pytest
from doc_blocks import ROOT

pytest.importorskip("transformers")
pytest.importorskip("peft")

from experiments.architectures.records import built
from experiments.architectures.report import (
    counts_table,
    failures_table,
    text_only,
    to_the_bit,
)

PAGE = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
FOUND = ROOT / "experiments" / "results" / "architectures" / "classes.json"
CLASSES = json.loads(FOUND.read_text(encoding="utf-8"))["classes"]


def test_tables():
    assert counts_table(CLASSES) in PAGE
    assert failures_table(CLASSES) in PAGE


def test_numbers_in_the_text():
    (bits, count) = re.search(r"In (\d+) of the (\d+) classes that were built", PAGE).groups()
    assert (int(bits), int(count)) == (to_the_bit(CLASSES), sum(map(built, CLASSES.values())))
    (texts,) = re.search(r"(\d+) classes of images and texts were given texts alone", PAGE).groups()
    assert int(texts) == len(text_only(CLASSES))


def test_a_class_is_counted_once():
    assert sum(int(line.split("|")[2]) for line in counts_table(CLASSES).splitlines()[2:-1]) == len(
        CLASSES
    )
