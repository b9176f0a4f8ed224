"""Tables of results with known answers."""

import pytest
from known_results import RESULTS, result
from small_models import quick_collections

from experiments import plots, report


def test_table1():
    grid = report.cells(RESULTS)
    assert report.table1(grid, "accuracy") == [
        ["task", "zo", "fo-lora", "hybrid-lora"],
        ["copa", "50.0 ± 0.0", "75.0 ± 7.1", "**80.0 ± 14.1**"],
    ]
    assert report.table1(grid, "loss")[1] == ["copa", "4.300 ± 0.141", *LOSSES]
    assert report.table1(grid, "train_loss")[1][2:] == ["**0.800 ± 0.071**", "**0.800 ± 0.141**"]


LOSSES = ["**2.600 ± 0.141**", "**2.600 ± 0.283**"]


def test_table1_as_numbers():
    sentences = [{**r, "task": "sst2-sentences", "scored": False} for r in RESULTS[:1]]
    head, *rows = report.mean_table(report.cells([*RESULTS[2:4], *sentences]))
    assert head[3:6] == ["accuracy", "accuracy_std", "f1"]
    assert rows[0][:3] == ["copa", "fo-lora", 2]
    assert rows[0][3:] == pytest.approx([0.75, 0.5**0.5 / 10, 0.375, 0.5**0.5 / 20, 2.6, LAST])
    assert rows[1] == ["sst2-sentences", "zo", 1, "", "", "", "", 4.4, ""]


LAST = 0.1 * 2**0.5


def test_table1_of_several_tasks():
    sentences = [{**r, "task": "sst2-sentences", "scored": False} for r in RESULTS[:4]]
    grid = report.cells([*RESULTS, *sentences])
    assert [row[0] for row in report.table1(grid, "accuracy")] == ["task", "copa"]
    rows = report.table1(grid, "loss")
    assert [row[0] for row in rows] == ["task", "copa", "sst2-sentences"]
    assert rows[2][3] == ""


def test_costs_to_a_given_loss():
    head, zo, fo, hybrid = report.cost_table(report.cells(RESULTS), "copa")
    assert head[4] == "to 3.400: steps"
    # zo reaches 3.4 after 20 and 10 steps of two seconds; 3.4 is also its own.
    assert zo == ["zo", "3.300 ± 0.141", "2.000", "5", "15", "30.0", "3.400", "15", "30.0"]
    # fo-lora's seeds reach 1.5 and 1.7: all reach 1.7, after 20 steps of one second.
    assert fo[4:] == ["10", "10.0", "1.700", "20", "20.0"]
    # hybrid's first seed is there after 10 steps, its second stays at 1.8.
    assert hybrid[4:] == ["10", "20.0", "1.700", "1 of 2 seeds reach it", "-"]
    never = [*RESULTS[2:4], result("hybrid-lora", 0, [4, 3])]
    assert report.cost_table(report.cells(never), "copa")[2][-2:] == ["never", "-"]


def test_long_tables():
    rows = report.long_table([*RESULTS[:1], {**RESULTS[2], "scored": False}])
    assert all(len(row) == len(rows[0]) for row in rows)
    first = dict(zip(*rows[:2], strict=True))
    assert first == {
        "task": "copa",
        "method": "zo",
        "seed": 0,
        "test_accuracy": 0.5,
        "test_f1": 0.25,
        "test_loss": 4.4,
        "dev_loss": 3.4,
        "train_loss": 1.7,
        "best_step": 20,
        "steps": 20,
        "seconds": 40.0,
        "seconds_per_step": 2.0,
        "peak_memory_bytes": 5_000_000,
        "parameters_zo": 1,
        "parameters_fo": 2,
        "skipped_steps": 0,
    }
    assert rows[2][3:5] == ["", ""]
    curves = report.curve_table(RESULTS[:1])
    assert curves[-1] == ["copa", "zo", 0, 20, 40.0, 3.4, 1.7, 0.5, 0.25]
    assert report.as_csv([["a", "b,c"]]) == 'a,"b,c"\n'


def test_what_diverges():
    assert not plots.diverges(RESULTS[:2])
    assert plots.diverges([result("zo", 0, [4, 3, 4.5]), result("zo", 1, [4, 3, 3.8])])
    assert plots.diverges([result("zo", 0, [4, 3, float("nan")])])


def test_markdown():
    assert report.markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
