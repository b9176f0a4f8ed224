"""The table of docs/side-updates.md is that of the committed study."""

import json
import statistics

from doc_blocks import ROOT

from experiments.quantized.updates import table

PAGE = (ROOT / "docs" / "side-updates.md").read_text(encoding="utf-8")
FOUND = json.loads(
    (ROOT / "experiments" / "results" / "quantized" / "updates.json").read_text(encoding="utf-8")
)


def test_the_table_is_the_one_of_the_results():
    assert table(FOUND) in PAGE


def test_losses_before_training_are_those_of_the_runs():
    runs = FOUND["runs"]["sst2-sentences, int4"]["dense"].values()
    for part in ("train", "dev"):
        (before,) = {f"{run[f'{part}_start']:.2f}" for run in runs}
        assert f"{before} in " in PAGE


def test_losses_in_the_text_are_those_of_the_table():
    cells = [line.split(" | ") for line in table(FOUND).splitlines()]
    ends = {row[1]: row[3].split()[0] for row in cells[2:]}
    assert f"a V that stays costs: {ends['side, rank 1, V stays']}" in PAGE
    assert f"against {ends['side, rank 1, V anew every 25']} drawn" in PAGE
    assert f"loses a little ({ends['folded at 32']})" in PAGE


def test_rounding_ends_above_its_start_and_side_updates_near_dense_ones():
    ways = FOUND["runs"]["sst2-sentences, int4"]

    def ends(name):
        return [run["train"] for key, run in ways[name].items() if key.startswith("0.0001,")]

    start = ways["dense"]["0.0001, seed 0"]["train_start"]
    assert min(ends("rounded")) > start
    side, dense = ends("side, rank 16, V stays"), ends("dense")
    assert abs(statistics.mean(side) - statistics.mean(dense)) < statistics.stdev(side)
