"""The comparison: a whole grid, small; the paper's command on a small model."""

import csv
import json
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from small_models import SIZES, quick_collections, tiny, word_tokenizer, words

from experiments import compare
from experiments.methods import PAPER_METHODS


def test_a_grid_is_rendered(tiny, words, tmp_path):
    arguments = ["--model", str(tiny), "--data", str(words), "--no-save", *SIZES]
    arguments += ["--methods", "zo", "fo-prompt", "hybrid-prompt", "--rates", "prompt"]
    arguments += ["--steps", "4", "--eval-every", "2", "--lr-zo", "1e-4", "--lr-fo", "1e-2"]
    arguments += ["--out", str(tmp_path)]
    assert compare.main([*arguments, "--tasks", "copa", "--seeds", "0", "1"]) == 0
    assert compare.main([*arguments, "--tasks", "sst2-sentences", "--seeds", "1"]) == 0
    for task, seeds in (("copa", 2), ("sst2-sentences", 1)):
        for figure in ("figure2", "figure3"):
            assert (tmp_path / f"{figure}-{task}.png").stat().st_size > 1000
        with (tmp_path / f"figure2-{task}.csv").open() as lines:
            assert len(list(csv.DictReader(lines))) == 7 * seeds * 3
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
        assert len(list(csv.DictReader(lines))) == (2 + 1) * 3
    with (tmp_path / "curves.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == (2 + 1) * 3 * 3
    written = (tmp_path / "results.json").read_text()
    assert str(tmp_path) not in written + text
    assert json.loads(written)["settings"]["copa zo"]["lr_zo"] == 1e-4


def test_the_papers_command_on_a_small_model_of_the_kind(words, tmp_path):
    """`make opt-1.3b`: presets and all methods, but few steps of a model that is small."""
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    recipe = makefile.split("\nopt-1.3b:\n")[1].split("\n\n")[0].replace("\\\n", " ")
    flag, program, *arguments = shlex.split(recipe)[1:]
    assert (flag, program) == ("-m", "experiments.compare")
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
    assert list(settings) == [f"sst2 {method}" for method in PAPER_METHODS]
    assert settings["sst2 hybrid-prompt"]["lr_zo"] == 1e-7
    assert settings["sst2 hybrid-prompt"]["dtype"] == "bfloat16"
    assert {settings[f"sst2 {m}"]["optimizer"] for m in PAPER_METHODS if m != "zo"} == {"sgd"}
    assert settings["sst2 zo"]["model"] == "opt-1.3b"


def test_bad_options_are_explained(tmp_path, capsys):
    arguments = ["--tasks", "sentiment", "--model", "nowhere/at-all", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert "zo has no preset" in capsys.readouterr().err
