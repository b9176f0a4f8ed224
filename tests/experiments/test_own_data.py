"""A user's own texts and labels: files, columns, labels of any number and kind, and training."""

import csv
import json
import re

import pytest
import transformers
from small_models import RUN, quick_collections, tiny

from experiments import finetune
from experiments.files import DataError
from experiments.forms import own_form
from experiments.own_data import Columns, label_names, load

TOPICS = ("w3", "w4", "w5")
SIZES = dict(seed=0, train=1000, dev=100, test=1000)


def rows_of(count, labels=("bad", "good", "so so"), first=0):
    return [
        dict(text=f"w{3 + i % len(labels)} w{10 + i}", label=labels[i % len(labels)])
        for i in range(first, first + count)
    ]


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def texts(parts):
    return [[row["text"] for row in part] for part in parts]


def test_one_file_is_split(tmp_path):
    path = write_csv(tmp_path / "own.csv", rows_of(60))
    found = load(path, Columns(), **SIZES)
    assert found.labels == ("bad", "good", "so so")
    assert [len(part) for part in found.parts] == [42, 6, 12]
    together = sorted(text for part in texts(found.parts) for text in part)
    assert together == sorted(row["text"] for row in rows_of(60))
    for part in found.parts:
        for row in part:
            assert row["label"] == int(row["text"].split()[0][1:]) - 3
    assert found == load(path, Columns(), **SIZES)
    assert found != load(path, Columns(), **{**SIZES, "seed": 1})
    sizes = dict(seed=0, train=10, dev=3, test=5)
    assert [len(part) for part in load(path, Columns(), **sizes).parts] == [10, 3, 5]


@pytest.mark.parametrize("there", [(), ("dev",), ("test",), ("dev", "test")])
def test_files_of_a_folder(there, tmp_path):
    counts = dict(train=60, dev=9, test=6)
    for i, split in enumerate(("train", *there)):
        write_csv(tmp_path / f"{split}.csv", rows_of(counts[split], first=100 * i))
    parts = load(tmp_path, Columns(), **SIZES).parts
    held_out = (0 if "test" in there else 12) + (0 if "dev" in there else 6)
    assert len(parts.train) == 60 - held_out
    assert len(parts.dev) == (9 if "dev" in there else 6)
    assert len(parts.test) == (6 if "test" in there else 12)
    known = {row["text"] for i in range(len(there)) for row in rows_of(9, first=100 * (i + 1))}
    for split, part in (("dev", parts.dev), ("test", parts.test)):
        for row in part:
            assert (row["text"] in known) == (split in there)


@pytest.mark.parametrize("name", ["validation.tsv", "valid.jsonl", "val.csv"])
def test_other_names_of_development_files(name, tmp_path):
    (tmp_path / "training.jsonl").write_text("\n".join(map(json.dumps, rows_of(60))))
    rows = rows_of(6, first=100)
    if name.endswith("jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
        text = "\n".join(lines)
        (tmp_path / name).write_text(text.replace(",", "\t") if "tsv" in name else text)
    assert sorted(texts(load(tmp_path, Columns(), **SIZES).parts)[1]) == sorted(
        row["text"] for row in rows
    )


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("b", "a", "c"), ("a", "b", "c")),
        (("10", "9", "-1"), ("-1", "9", "10")),
        (("1.5", "0.5", "1"), ("0.5", "1", "1.5")),
        (("10", "9", "x"), ("10", "9", "x")),
    ],
)
def test_order_of_labels(labels, names, tmp_path):
    assert label_names(tmp_path, [*labels, labels[0]]) == names


@pytest.mark.parametrize("labels", [(0, 1), (False, True), (1.0, 2.0), (3, 1, 2, 0)])
def test_labels_of_json(labels, tmp_path):
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows_of(60, labels))))
    found = load(tmp_path / "own.jsonl", Columns(), **SIZES)
    assert found.labels == tuple(map(str, sorted(labels)))


def test_columns_of_other_names_and_pairs(tmp_path):
    rows = [
        dict(id=i, first=row["text"], second=f"s{i}", stars=row["label"])
        for i, row in enumerate(rows_of(30))
    ]
    write_csv(tmp_path / "own.csv", rows)
    found = load(tmp_path / "own.csv", Columns("first", "second", "stars"), **SIZES)
    row = found.parts.train[0]
    assert set(row) == {"text", "pair", "label"}
    form = own_form(found.labels, "{text} / {pair}:")
    (choice,) = form.choices([row])
    prompt = f"{row['text']} / {row['pair']}:"
    assert choice.options == tuple((prompt, f" {label}") for label in found.labels)
    assert choice.label == row["label"]
    (example,) = form.examples([row])
    assert example.rows == ((row["text"], row["pair"]),)
    assert form.layout.outputs == 3
    assert form.layout.label_names == found.labels
    (example,) = form.examples([dict(text=" a ", label=2)])
    assert example.rows == (("a",),)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (rows_of(9), Columns(text="review"), r"must be a column 'review', got \['text', 'label'\]"),
        (rows_of(9), Columns(label="stars"), "a column 'stars', .* name yours by --label-column"),
        (rows_of(9), Columns(pair="b"), "a column 'b', .* name yours by --pair-column"),
        ([*rows_of(2), dict(text=" ", label="a")], Columns(), "row 3: 'text' must be a text"),
        ([*rows_of(2), dict(text="a", label="")], Columns(), "row 3: 'label' must be a text or a"),
        (rows_of(60, labels=[str(i) for i in range(40)]), Columns(), "classes, got 40 different"),
        (rows_of(60, labels=("a",)), Columns(), "must have two labels, got one"),
        (rows_of(2), Columns(), "no training examples"),
    ],
)
def test_bad_data(rows, columns, message, tmp_path):
    path = write_csv(tmp_path / "own.csv", rows)
    with pytest.raises(DataError, match=message):
        load(path, columns, **SIZES)


def test_a_label_without_training_examples(tmp_path):
    path = write_csv(tmp_path / "own.csv", [*rows_of(20), dict(text="a", label="rare")])
    with pytest.raises(DataError, match=r"among the 15 training examples drawn, not so \['rare'\]"):
        [load(path, Columns(), **{**SIZES, "seed": seed}) for seed in range(20)]


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        load(tmp_path / "nowhere", Columns(), **SIZES)
    with pytest.raises(DataError, match=r"must hold one of train\.csv, train\.tsv, train\.jsonl"):
        load(tmp_path, Columns(), **SIZES)
    for name in ("train.csv", "dev.csv"):
        write_csv(tmp_path / name, rows_of(30))
    (tmp_path / "val.tsv").write_text("text\tlabel\na\tbad\n")
    with pytest.raises(DataError, match=r"dev\.csv and val\.tsv must not both be there"):
        load(tmp_path, Columns(), **SIZES)
    (tmp_path / "val.tsv").unlink()
    write_csv(tmp_path / "dev.csv", rows_of(2, labels=("bad", "worse")))
    with pytest.raises(DataError, match=r"dev\.csv, row 2: the label 'worse' must be one of"):
        load(tmp_path, Columns(), **SIZES)


def test_an_encoder_learns_three_labels(tmp_path):
    """From the command line: saved with the labels' names, and scored as it was."""
    sentences = dict(
        film=("The actor was on screen", "The film had a plot", "We saw the movie"),
        food=("The soup was hot", "She ate bread", "Dinner had three courses"),
        sport=("The team scored", "He ran the race", "The match was a draw"),
    )
    rows = [
        dict(review=f"{text} {i}.", kind=label)
        for i in range(6)
        for label, own in sentences.items()
        for text in own
    ]
    write_csv(tmp_path / "own.csv", rows)
    arguments = ["--data", str(tmp_path / "own.csv"), "--text-column", "review"]
    arguments += ["--label-column", "kind", "--methods", "hybrid-lora", "--steps", "4"]
    arguments += ["--eval-every", "2", "--batch-size", "8", "--head", "random"]
    assert finetune.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    folder = tmp_path / "out" / "text-classification" / "hybrid-lora" / "seed-0"
    result = json.loads((folder / "result.json").read_text())
    assert result["settings"]["columns"] == dict(text="review", pair=None, label="kind")
    assert result["test"]["loss"] < result["untrained"]["loss"] < 1.5
    assert result["test_examples"] == 10
    assert result["head"] == "random"
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    assert config.id2label == {0: "film", 1: "food", 2: "sport"}


def test_a_causal_language_model_chooses_labels(tiny, tmp_path, capsys):
    write_csv(tmp_path / "own.csv", rows_of(60, labels=("w6", "w7", "w8")))
    arguments = ["--model", str(tiny), "--data", str(tmp_path / "own.csv")]
    arguments += ["--template", "{text} w9", "--methods", "zo", "hybrid-lora", "--no-save"]
    finetune.main([*RUN, *arguments, "--out", str(tmp_path / "out")])
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "tiny on own.csv, batches of 8" in out
    results = json.loads((tmp_path / "out" / "text-classification" / "results.json").read_text())
    assert [run["method"] for run in results["runs"]] == ["zo", "hybrid-lora"]
    assert results["runs"][0]["settings"]["template"] == "{text} w9"
    with pytest.raises(SystemExit):
        finetune.main([*RUN, *arguments, "--template", "{text}", "--out", str(tmp_path / "out")])
    assert "holds a run with other settings (template" in re.sub(
        r"\s+", " ", capsys.readouterr().err
    )
