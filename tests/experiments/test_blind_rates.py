"""The blind check of suggested rates: suggestions first, and grids that grow at their ends."""

import json

import pytest
from small_models import SIZES, quick_collections, tiny, words

from experiments.directions.grid import BASELINE
from experiments.rates import __main__ as rates
from experiments.rates import blind

__all__ = ["quick_collections", "tiny", "words"]


@pytest.mark.parametrize(
    ("grid", "best", "further"),
    [
        ((1e-2, 3e-2, 1e-1, 3e-1), 3e-1, 1.0),
        ((1e-2, 3e-2, 1e-1, 3e-1, 1.0), 1.0, 3.0),
        ((1e-2, 3e-2, 1e-1, 3e-1), 1e-2, 3e-3),
        ((5e-5, 1e-4, 2e-4, 4e-4), 5e-5, 2.5e-5),
        ((3e-4, 1e-3, 3e-3), 3e-3, 1e-2),
        ((3e-4, 1e-3, 3e-3), 1e-3, None),
    ],
)
def test_the_next_rate(grid, best, further):
    assert blind.beyond(grid, best) == further
    assert blind.beyond(grid[::-1], best) == further


class Losses:
    """Runs whose losses are a function of the rate."""

    def __init__(self, loss):
        self.loss = loss

    def searched(self, cell):
        found = {rate: {"loss": self.loss(rate)} for rate in cell.rates}
        return {rate: {"best": one, "curve": [{"loss": 9.0}, one]} for rate, one in found.items()}


@pytest.mark.parametrize(
    ("loss", "tried", "best", "at_an_end"),
    [
        (lambda rate: (rate - 0.1) ** 2, [0.01, 0.03, 0.1, 0.3], 0.1, False),
        (lambda rate: (rate - 0.3) ** 2, [0.01, 0.03, 0.1, 0.3, 1.0], 0.3, False),
        (lambda rate: -rate, [0.01, 0.03, 0.1, 0.3, 1.0, 3.0], 3.0, True),
        (lambda rate: rate, [0.001, 0.003, 0.01, 0.03, 0.1, 0.3], 0.001, True),
        (
            lambda rate: rate if rate > 0.1 else float("nan"),
            [0.01, 0.03, 0.1, 0.3, 1.0],
            0.3,
            False,
        ),
    ],
)
def test_a_grid_grows_where_its_best_rate_is_at_an_end(loss, tried, best, at_an_end):
    (cell,) = (c for c in blind.cells(["copa"]) if c.method == "fo-prompt")
    row = blind._grown(Losses(loss), cell)
    assert [float(rate) for rate in row["losses"]] == tried
    assert (row["best"], row["at_an_end"]) == (best, at_an_end)
    json.dumps(row, allow_nan=False)


def test_suggestions_first(tiny, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(blind, "GRID", {("zo", BASELINE): (1e-4, 1e-3, 1e-2)})
    monkeypatch.setattr(blind, "STEPS", 2)
    monkeypatch.setattr(blind, "EVERY", 1)
    monkeypatch.setattr(blind, "GROWTH", 0)
    arguments = [*SIZES, "--tasks", "copa", "--model", str(tiny), "--data", str(words)]
    arguments += ["--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        blind.main([*arguments, "--do", "grid"])
    assert "--out must hold suggestions" in capsys.readouterr().err
    assert blind.main(arguments) == 0
    kept = (tmp_path / "blind" / "tiny-suggested.json").read_text()
    assert blind.rows(tmp_path / "blind") == []
    assert blind.main([*arguments, "--do", "grid"]) == 0
    assert (tmp_path / "blind" / "tiny-suggested.json").read_text() == kept
    (row,) = blind.rows(tmp_path / "blind")
    (suggestion,) = json.loads(kept)["rows"]
    assert row["suggested"] == suggestion["suggested"]
    assert list(row["losses"]) == ["0.0001", "0.001", "0.01"]
    assert row["losses"][f"{row['best']:g}"] == min(row["losses"].values())

    calibration = {**row, "other": False}
    (tmp_path / "tiny.json").write_text(json.dumps({"rows": [calibration]}))
    assert rates.main(["--out", str(tmp_path), "--do", "report"]) == 0
    _, shown = (tmp_path / "table.md").read_text().split("\n## Blind\n")
    assert f"- copa, zo, {BASELINE}: start {row['start']:.3f}; 0.0001: " in shown
