"""The tables and shares of docs/learning-rates.md are those of the committed results."""

import json
import re

from doc_blocks import ROOT
from test_numbers import rows

from zofo_optim.hyperparameters.rates import OF_FIRST_ORDER, OF_ZEROTH_ORDER

PAGE = (ROOT / "docs" / "learning-rates.md").read_text(encoding="utf-8")
RESULTS = ROOT / "experiments" / "results" / "rates"
TITLES = {
    "Calibration": "calibration rows",
    "Other task and adapter": "rows of another task and adapter",
    "Blind": "blind rows",
}
SHOWN = ("model", "task", "method", "rate", "best", "suggested", "over best")


def test_tables():
    shown = PAGE.split("\n## How good it is\n")[1].split("\n## ")[0]
    source = (RESULTS / "table.md").read_text(encoding="utf-8")
    for title, named in TITLES.items():
        ours = rows(shown.split(f"\n{title}:\n\n")[1].split("\n\n")[0])
        theirs = rows(source.split(f"\n## {title}\n")[1].split("\n## ")[0])
        head = theirs[0]
        places = [head.index(name) for name in SHOWN]
        assert ours == [[line[place] for place in places] for line in theirs]
        assert len(ours) > 5
        (counts, *_) = re.findall(r"suggested: (\d+ of \d+)", source.split(f"\n## {title}\n")[1])
        assert f"{counts} {named}" in " ".join(shown.split())


def test_the_run_that_diverged():
    run = json.loads((RESULTS / "blind" / "stories260k-wic-zo-0.0004.json").read_text())
    start, end = (run["curve"][place]["loss"] for place in (0, -1))
    assert f"from a loss of {start:.1f} to {end:.0f}," in PAGE
    suggested = json.loads((RESULTS / "blind" / "stories260k-suggested.json").read_text())["rows"]
    (row,) = (r for r in suggested if (r["task"], r["kind"]) == ("wic", "Gaussian"))
    assert f"the suggested {row['suggested']:.2g}." in PAGE
    assert "lr* has a standard error of nan" in row["said"]
    (trace,) = re.findall(r"the trace of H is (\S+) ", row["said"])
    assert f"is {OF_ZEROTH_ORDER / float(trace):.2g} here." in PAGE


def test_shares():
    table = rows(PAGE.split("\n## How a rate is found\n")[1].split("\n## ")[0])
    assert [line[3] for line in table[1:]] == [f"{OF_ZEROTH_ORDER:g}", f"{OF_FIRST_ORDER:g}"]


def test_suggestions_are_of_these_shares():
    """The results were made by the constants that the library has."""
    for file in (*RESULTS.glob("*.json"), *RESULTS.glob("blind/*-suggested.json")):
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            share = OF_ZEROTH_ORDER if row["rate"] == "lr_zo" else OF_FIRST_ORDER
            assert f"Suggested is {share:g} lr*." in row["said"]
