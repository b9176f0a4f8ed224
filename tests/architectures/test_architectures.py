"""A step on tiny models of transformers, in place, streamed, low-rank and beside LoRA."""

import copy
import datetime
import json
import os
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from transformers import Qwen2VLConfig

from experiments.architectures import __main__ as command
from experiments.architectures.building import NotBuilt, build
from experiments.architectures.checks import (
    CHECKS,
    Disagreement,
    PeftAlone,
    agree,
    check_lora,
    check_streamed,
    run_checks,
)
from experiments.architectures.classes import all_cases
from experiments.architectures.records import CHECKS as NAMES
from experiments.architectures.records import Records, passed
from experiments.architectures.step import Step
from experiments.architectures.tasks import TASKS
from experiments.architectures.worker import Worker
from zofo_optim.perturbation.streaming import Streaming

QWEN2_VL = pytest.param(
    "Qwen2VLForConditionalGeneration",
    marks=pytest.mark.skipif(
        not hasattr(Qwen2VLConfig(), "vision_start_token_id"),
        reason="transformers 4 makes no vision_start_token_id for it, which its model reads",
    ),
)
ALWAYS = [
    "LlavaForConditionalGeneration",
    QWEN2_VL,
    "T5ForConditionalGeneration",
    "MambaForCausalLM",
    "MixtralForCausalLM",
    "ResNetForImageClassification",
    "BertForSequenceClassification",
    "CLIPModel",
    "YolosForObjectDetection",
]
CASES = all_cases()


def nightly(names):
    """Every class, where ZOFO_NIGHTLY is set; with a budget, from another one on every day."""
    if not os.environ.get("ZOFO_NIGHTLY"):
        return ["each class"]
    if "ZOFO_NIGHTLY_MINUTES" not in os.environ:
        return names
    first = datetime.date.today().toordinal() * 397 % len(names)
    return names[first:] + names[:first]


@pytest.fixture(autouse=True)
def quietly(recwarn):
    """What models and peft warn of is theirs."""


@pytest.mark.parametrize("name", ALWAYS)
def test_a_step_in_every_way(name):
    model, batch = build(CASES[name])
    result = run_checks(model, batch)
    assert result["failed"] == {}
    assert result["passed"] == list(CHECKS)
    assert result["slope"] != 0


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", QWEN2_VL])
def test_images_reach_the_loss(name):
    model, batch = build(CASES[name])
    with torch.no_grad():
        before = model(**batch).loss
        after = model(**batch | {"pixel_values": -batch["pixel_values"]}).loss
    assert not torch.equal(before, after)


def test_models_repeat():
    (a, batch), (b, again) = (build(CASES["LlamaForCausalLM"]) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert all(torch.equal(batch[key], again[key]) for key in batch)


def test_a_copy_that_is_not_displaced_is_found(monkeypatch):
    """A streamed step that leaves one weight where it is does not pass."""
    copied = Streaming._copy

    def all_but_one(self, source):
        if source.name == "classifier.weight":
            return source.parameter.detach().clone()
        return copied(self, source)

    monkeypatch.setattr(Streaming, "_copy", all_but_one)
    model, batch = build(CASES["BertForSequenceClassification"])
    model.requires_grad_(False)
    with pytest.raises((RuntimeError, Disagreement)):
        check_streamed(model, batch)


def test_disagreements_are_told():
    agree("losses", torch.ones(2), torch.ones(2) + 1e-6)
    with pytest.raises(Disagreement, match=r"losses differ by 0\.1"):
        agree("losses", torch.ones(2), torch.ones(2) + 0.1)


def test_a_class_that_cannot_be_built_says_why(monkeypatch):
    from experiments.architectures import building

    monkeypatch.setattr(building, "LARGEST", 1000)
    with pytest.raises(NotBuilt, match=r"not tiny: [0-9,]+ parameters"):
        build(CASES["LlamaForCausalLM"])


def test_every_mapping_is_there():
    assert {case.task for case in CASES.values()} == set(TASKS)
    assert len(CASES) > 1000
    assert tuple(CHECKS) == NAMES


def test_a_model_that_peft_cannot_train_is_told_apart():
    """SqueezeBERT's output depends on convolutions alone, and LoRA is on its pooler."""
    model, batch = build(CASES["SqueezeBertModel"])
    model.requires_grad_(False)
    with pytest.raises(PeftAlone, match="does not require grad"):
        check_lora(model, batch)


def test_steps_are_made_of_copies():
    model, batch = build(CASES["LlamaForCausalLM"])
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    Step(model, batch, perturbation="in_place")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_command_resumes(tmp_path, monkeypatch, capsys):
    """What the file has is not made again; failures are, on demand."""
    seen = []

    def examine(self, case):
        seen.append(case.name)
        if case.name.startswith("Opt") or len(seen) == 1:
            return {"task": case.task, "model_type": case.model_type, "not_built": "takes long"}
        return {
            "task": case.task,
            "model_type": case.model_type,
            "passed": ["streamed"],
            "failed": {},
            "seconds": 1.0,
            "parameters": 1,
            "inputs": ["input_ids"],
        }

    monkeypatch.setattr(Worker, "examine", examine)
    out = ["--out", str(tmp_path / "classes.json")]
    assert command.main(["llama", *out]) == 0
    made = list(seen)
    assert len(made) > 2
    assert command.main(["llama", "--resume", *out]) == 0
    assert seen == made
    assert command.main(["llama", "--resume", "--failed", *out]) == 0
    assert seen == [*made, made[0]]
    classes = json.loads((tmp_path / "classes.json").read_text())["classes"]
    assert set(classes) == set(made)
    assert all(passed(result) for result in classes.values())
    assert "passed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["no such model"])


def test_the_file_is_whole_after_each_class(tmp_path):
    records = Records(tmp_path / "a.json", keep=False)
    records.add("A", {"task": "causal_lm", "not_built": "why"})
    assert Records(tmp_path / "a.json", keep=True).classes == records.classes
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.nightly
@pytest.mark.parametrize("name", nightly(list(CASES)))
def test_all(name, examined):
    """Every class that passed when the results were made passes here."""
    known = Records(command.OUT, keep=True).classes.get(name)
    result = examined(CASES[name])
    if known and passed(known):
        assert passed(result), result
    elif not passed(result):
        pytest.skip(str(result.get("not_built", result.get("failed"))))


@pytest.fixture(scope="module")
def examined():
    """Within ZOFO_NIGHTLY_MINUTES, where they are set; what is left then is skipped."""
    worker = Worker(float(os.environ.get("ZOFO_NIGHTLY_LIMIT", "150")))
    minutes = float(os.environ.get("ZOFO_NIGHTLY_MINUTES", "inf"))
    end = time.monotonic() + 60 * minutes

    def examine(case):
        if time.monotonic() > end:
            pytest.skip(f"after the {minutes:g} minutes of ZOFO_NIGHTLY_MINUTES")
        return worker.examine(case)

    yield examine
    worker.close()
