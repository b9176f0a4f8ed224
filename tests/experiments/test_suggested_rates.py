"""Suggested rates beside searched ones: what is read, asked for, and written."""

import json

import pytest
from small_models import SIZES, quick_collections, tiny, words

from experiments.directions import grid
from experiments.rates import __main__ as command
from experiments.rates import found, report

__all__ = ["quick_collections", "tiny", "words"]


def cells_of(model):
    return [cell for some in grid.cells(grid.study_of(model)) for cell in some]


def test_the_best_rate_is_that_of_the_committed_runs():
    by_name = {(cell.task, cell.name): cell for cell in cells_of("stories260k")}
    gaussian = found.searched("stories260k", by_name["sst2-sentences", "zo, Gaussian"])
    assert set(gaussian.losses) == {5e-5, 1e-4, 2e-4, 4e-4}
    assert gaussian.best == 1e-4
    assert not gaussian.is_at_an_end
    of_preset = found.searched("stories260k", by_name["sst2", "fo-lora"])
    assert (of_preset.losses, of_preset.best, of_preset.is_at_an_end) == ({}, 1e-2, False)
    assert found.searched("other", by_name["sst2", "zo, Gaussian"]) is None


def test_what_is_other():
    others = {(c.task, c.method) for c in cells_of("stories260k") if found.is_other(c)}
    assert ("winogrande", "zo") in others
    assert ("sst2", "hybrid-prefix") in others
    assert all(task == "winogrande" or "prefix" in method for task, method in others)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """One kind and one adapter, with grids of two rates."""
    study = grid.Study(
        "tiny", {"copa": (4, (grid.BASELINE,))}, evaluations=2, zo=(1e-4,), beside=(1e-4,), fo=()
    )
    monkeypatch.setattr(grid, "STUDIES", (study,))
    monkeypatch.setattr(grid, "ADAPTERS", ("prompt",))
    runs = tmp_path / "runs.csv"
    rows = ["model,directions,rate,task,method,seed,dev_loss"]
    for kind, method, rates in (("Gaussian", "zo", (1e-4, 1e-3)), ("", "fo-prompt", (1e-2, 1e-1))):
        rows += [f"tiny,{kind},{rate},copa,{method},0,{4.0 + rate}" for rate in rates]
    runs.write_text("\n".join([*rows, "tiny,Gaussian,1,copa,zo,1,0.0"]) + "\n")
    read = found.searched

    def searched(model, cell):
        return read(model, cell, runs) if cell.method in ("zo", "fo-prompt") else None

    monkeypatch.setattr(command, "searched", searched)


def test_rates_are_asked_for_once_and_rendered(small, tiny, words, tmp_path):
    out = tmp_path / "out"
    arguments = [*SIZES, "--model", str(tiny), "--data", str(words), "--out", str(out)]
    assert command.main([*arguments, "--do", "suggest"]) == 0
    (file,) = out.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [(row["method"], row["best"]) for row in rows] == [("zo", 1e-4), ("fo-prompt", 1e-2)]
    assert all(row["evaluations"] > 0 and not row["other"] for row in rows)
    assert all(row["find_lr"] is None for row in rows)
    assert command.main([*arguments, "--sweep-steps", "10"]) == 0
    swept = json.loads(file.read_text())["rows"]
    assert [row["said"] for row in swept] == [row["said"] for row in rows]
    assert all(len(row["sweep"]["rates"]) <= 10 for row in swept)
    table = (out / "table.md").read_text()
    assert "| tiny | copa | zo, Gaussian | lr_zo | 0.0001* |" in table
    assert "## Other" not in table
    assert (out / "rates.png").is_file()


def test_the_report_needs_suggestions(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--do", "report", "--out", str(tmp_path)])
    assert "--out must hold suggestions" in capsys.readouterr().err


def test_what_is_near():
    assert report.is_near(3e-4, 1e-4)
    assert not report.is_near(3.1e-4, 1e-4)
    assert not report.is_near(3e-5, 1e-4)
    assert not report.is_near(None, 1e-4)
    rows = [dict(suggested=rate, find_lr=None, best=1.0) for rate in (0.5, 4.0)]
    assert report.summary(rows).endswith("rate: suggested: 1 of 2.")
