"""The table of docs/side-updates.md is that of the committed study."""

import json
import statistics

from doc_blocks import ROOT

from experiments.quantized.updates import table

PAGE = (ROOT / "docs" / "side-updates.md").read_text(encoding="utf-8")
FOUND = json.loads(
    (ROOT / "experiments" / "results" / "quantized" / "updates.json").read_text(encoding="utf-8")
)
LIBRARY = "the library's, rank 16"


def starts(bits):
    """Losses before training, the same in all runs of a grid."""
    runs = [
        run for way in FOUND["runs"][f"sst2-sentences, int{bits}"].values() for run in way.values()
    ]
    for part in ("train_start", "dev_start"):
        assert len({f"{run[part]:.4f}" for run in runs}) == 1
    return [f"{runs[0][part]:.2f}" for part in ("train_start", "dev_start")]


def test_the_table_is_the_one_of_the_results():
    assert table(FOUND) in PAGE


def test_losses_before_training_are_those_of_the_runs():
    four, eight = starts(4), starts(8)
    words = " ".join(PAGE.split())
    assert f"{four[0]} in training and {four[1]} in development (int4), " in words
    assert f"(int4), {eight[0]} and {eight[1]} (int8)" in words


def test_losses_in_the_text_are_those_of_the_table():
    lines = [line.strip("| ").split(" | ") for line in table(FOUND).splitlines()[2:]]
    ends = {(place[-4:], name): loss.split()[0] for place, name, _, loss, _ in lines}
    words = " ".join(PAGE.split())
    for said in (
        f"a V that stays costs: {ends['int4', 'side, rank 1, V stays']}, against "
        f"{ends['int4', 'side, rank 1, V anew every 25']} drawn anew",
        f"In 8 bits it falls, to {ends['int8', 'rounded']}, where side updates reach "
        f"{ends['int8', LIBRARY]}.",
        f"loses a little ({ends['int4', 'folded at 32']}), more with a direction for each example "
        f"({ends['int4', 'folded at 32, per example']})",
    ):
        assert said in words


def test_rounding_ends_above_its_start_and_side_updates_near_dense_ones():
    ways = FOUND["runs"]["sst2-sentences, int4"]

    def ends(name):
        return [run["train"] for key, run in ways[name].items() if key.startswith("0.0001,")]

    start = ways["dense"]["0.0001, seed 0"]["train_start"]
    assert min(ends("rounded")) > start
    side, dense = ends(LIBRARY), ends("dense")
    assert abs(statistics.mean(side) - statistics.mean(dense)) < statistics.stdev(side)
