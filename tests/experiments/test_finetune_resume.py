"""Runs that are interrupted go on; finished ones are read; others in the same folder are kept."""

import json
import re
from pathlib import Path

import pytest
from conftest import same_bits
from safetensors.torch import load_file
from small_models import RUN, SIZES, quick_collections, tiny, words

from experiments import compare, finetune, training


def test_a_run_killed_before_its_result_was_written(tiny, words, tmp_path, monkeypatch):
    """It makes no further step: the result is that of the checkpoint."""
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--no-save"]
    arguments = [*RUN, *arguments, "--methods", "hybrid-lora"]
    finetune.main([*arguments, "--out", str(tmp_path / "whole")])

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_result", killed)
        assert finetune.main([*arguments, "--out", str(tmp_path / "cut")]) == 130
    finetune.main([*arguments, "--out", str(tmp_path / "cut")])
    whole, cut = (
        json.loads((tmp_path / name / "copa" / "results.json").read_text())["runs"][0]
        for name in ("whole", "cut")
    )
    assert cut["steps"] == 4
    assert cut["test"] == whole["test"]
    assert [point["loss"] for point in cut["curve"]] == [point["loss"] for point in whole["curve"]]


def test_early_stopping_counts_on_after_an_interruption(tiny, words, tmp_path, monkeypatch):
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--no-save"]
    arguments += ["--methods", "fo-lora", "--steps", "9", "--eval-every", "1", "--patience", "3"]
    arguments += [*SIZES, "--lr-fo", "0", "--out", str(tmp_path)]
    step = training.FinetuneTrainer.training_step

    def fails(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training.FinetuneTrainer, "training_step", fails)
        assert finetune.main(arguments) == 130
    finetune.main(arguments)
    (run,) = json.loads((tmp_path / "copa" / "results.json").read_text())["runs"]
    assert run["steps"] == 4


@pytest.mark.parametrize("method", ["zo", "fo-prompt", "hybrid-lora", "hybrid-prefix"])
def test_an_interrupted_run_goes_on(method, tiny, words, tmp_path, monkeypatch):
    """Killed after an evaluation, it ends with the weights of a run that was not."""
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa"]
    arguments = [*SIZES, *arguments, "--lr-zo", "1e-3", "--lr-fo", "1e-2", "--methods", method]
    arguments += ["--steps", "6", "--eval-every", "2"]
    finetune.main([*arguments, "--out", str(tmp_path / "whole")])

    class Killed(Exception):
        pass

    step = training.FinetuneTrainer.training_step

    def fails(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training.FinetuneTrainer, "training_step", fails)
        with pytest.raises(Killed):
            finetune.main([*arguments, "--out", str(tmp_path / "cut")])
    folder = Path("copa") / method / "seed-0"
    assert not (tmp_path / "cut" / folder / "result.json").exists()
    # and killed again, while a later checkpoint was being written
    (tmp_path / "cut" / folder / "checkpoints" / "checkpoint-5").mkdir()
    finetune.main([*arguments, "--out", str(tmp_path / "cut")])
    whole, cut = (
        json.loads((tmp_path / name / folder / "result.json").read_text())
        for name in ("whole", "cut")
    )
    for point, again in zip(whole["curve"], cut["curve"], strict=True):
        assert {**point, "seconds": 0} == {**again, "seconds": 0}
    assert whole["losses"] == cut["losses"]
    assert whole["test"] == cut["test"]
    assert not (tmp_path / "cut" / folder / "checkpoints").exists()
    for file in (tmp_path / "whole" / folder).rglob("*.safetensors"):
        one, two = (
            load_file(tmp_path / name / folder / file.relative_to(tmp_path / "whole" / folder))
            for name in ("whole", "cut")
        )
        assert all(same_bits(one[key], two[key]) for key in one)


def test_a_finished_run_is_not_run_again(tiny, words, tmp_path, capsys):
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--no-save"]
    arguments = [*RUN, *arguments, "--methods", "fo-lora", "--out", str(tmp_path)]
    finetune.main(arguments)
    note = tmp_path / "copa" / "fo-lora" / "seed-0" / "result.json"
    first = note.read_text()
    assert not (note.parent / "adapter").exists()
    finetune.main(arguments)
    assert note.read_text() == first
    with pytest.raises(SystemExit):
        finetune.main([*arguments, "--lr-fo", "0.5"])
    message = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "holds a run with other settings (lr_fo 0.001 there, 0.5 asked for)" in message
    assert note.read_text() == first
    # What makes no difference to the method may change; weights must be there if wanted.
    finetune.main([*arguments, "--lr-zo", "0.5", "--mu", "3", "--include", "mlp", "--tokens", "7"])
    assert note.read_text() == first
    arguments.remove("--no-save")
    with pytest.raises(SystemExit):
        finetune.main(arguments)
    assert "without its weights" in re.sub(r"\s+", " ", capsys.readouterr().err)
    finetune.main([*arguments, "--lr-fo", "0.5", "--overwrite"])
    assert json.loads(note.read_text())["settings"]["lr_fo"] == 0.5
    assert (note.parent / "adapter").exists()
    (note.parent / "settings.json").write_text("{")
    with pytest.raises(SystemExit):
        finetune.main([*arguments, "--lr-fo", "0.5"])
    assert "holds a damaged run" in re.sub(r"\s+", " ", capsys.readouterr().err)
    # Another method's run is shown beside it.
    finetune.main([*arguments, "--lr-fo", "0.5", "--overwrite", "--methods", "zo"])
    finetune.main([*arguments, "--lr-fo", "0.5", "--overwrite"])
    runs = json.loads((tmp_path / "copa" / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["zo", "fo-lora"]


def test_an_interruption_is_told(tiny, words, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.FinetuneTrainer, "compute_loss", interrupted)
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--no-save"]
    assert finetune.main([*RUN, *arguments, "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().out


def test_runs_of_earlier_versions_are_read(tiny, words, tmp_path, capsys):
    """They know no columns of a user's own data, no scores of the untrained model, no rule."""
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--no-save"]
    arguments = [*RUN, *arguments, "--methods", "zo", "fo-lora", "--out", str(tmp_path)]
    finetune.main(arguments)
    before = {}
    for folder in tmp_path.glob("copa/*/seed-0"):
        result = json.loads((folder / "result.json").read_text())
        settings = json.loads((folder / "settings.json").read_text())
        for new in ("untrained", "test_examples"):
            del result[new]
        for new in ("columns", "template", "zo_rule"):
            del settings[new], result["settings"][new]
        (folder / "settings.json").write_text(json.dumps(settings))
        before[folder] = json.dumps(result)
        (folder / "result.json").write_text(before[folder])
    capsys.readouterr()
    finetune.main(arguments)
    assert "untrained" not in capsys.readouterr().out
    compared = [*arguments[: arguments.index("--task")], *arguments[arguments.index("--no-save") :]]
    compare.main([*compared, "--tasks", "copa"])
    for folder, text in before.items():
        assert (folder / "result.json").read_text() == text
    assert "## Test accuracy, %" in (tmp_path / "table1.md").read_text()
