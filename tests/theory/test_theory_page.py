"""The tables of docs/theory.md are those of the committed results, and these are of the JSON."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the convergence study needs it")

from experiments.convergence import report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "convergence"
PAGE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
SHOWN = PAGE.split("\n## Against runs\n")[1]


def rows(text):
    """Cells of tables, without the lines that rule them."""
    lines = [line for line in text.splitlines() if line.startswith("|") and set(line) - set("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_part_is_committed():
    assert {path.stem for path in RESULTS.glob("*.json")} == set(report.TABLES)


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("name", report.TABLES)
def test_results_are_strict_json(name):
    """Without NaN and Infinity."""
    text = (RESULTS / f"{name}.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=no_constant)["part"] == name


@pytest.mark.parametrize("name", report.TABLES)
def test_the_table_is_of_the_json(name):
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["result"]
    table = (RESULTS / "table.md").read_text(encoding="utf-8")
    assert "\n".join(report.TABLES[name](found)) in table


def test_rows_of_the_page_are_rows_of_the_results():
    committed = rows((RESULTS / "table.md").read_text(encoding="utf-8"))
    shown = rows(SHOWN)
    assert len(shown) > 20
    for row in shown:
        assert row in committed, row
