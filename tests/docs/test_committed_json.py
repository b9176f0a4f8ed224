"""Committed results are JSON that every reader takes: it has no NaN and no infinity."""

import json

import pytest
from doc_blocks import ROOT

FILES = sorted(
    file
    for folder in ("experiments/results", "benchmarks/results")
    for file in (ROOT / folder).rglob("*.json")
)


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def test_committed_json_is_strict():
    assert FILES
    for file in FILES:
        try:
            json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
        except ValueError as error:
            pytest.fail(f"{file.relative_to(ROOT)}: {error}")


def test_what_is_not_json_is_refused():
    with pytest.raises(ValueError, match=r"^NaN is not JSON"):
        json.loads('{"loss": NaN}', parse_constant=refuse)
