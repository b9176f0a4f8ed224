"""The tasks' rows: files, the hub, the protocol."""

import json
import os

import datasets
import pytest

from experiments import tasks
from experiments.choices import CHOICES
from experiments.classification import LAYOUTS
from experiments.files import DataError
from experiments.forms import FORMS
from experiments.tasks import protocol, read

DATA = os.environ.get("ZOFO_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="ZOFO_DATA does not name the data folder")

COPA = dict(premise="It rained.", choice1="A.", choice2="B.", question="effect", label=1)
WINOGRANDE = dict(sentence="X _ Y", option1="p", option2="q", answer="2")


def tsv(folder, split, rows):
    folder.mkdir(exist_ok=True)
    lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
    (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def test_every_task_has_both_forms():
    assert set(CHOICES) == set(tasks.TASKS)
    assert set(LAYOUTS) == {name for name, task in tasks.TASKS.items() if task.scored}


def test_files_of_each_form(tmp_path):
    tsv(tmp_path, "train", [("fine \u2028film", 1), ("bad", 0)])
    assert read("sst2", tmp_path, "train") == [
        dict(sentence="fine \u2028film", label=1),
        dict(sentence="bad", label=0),
    ]
    (tmp_path / "train.jsonl").write_text(json.dumps(COPA) + "\n")
    assert read("copa", tmp_path, "train") == [COPA]
    (tmp_path / "train_m.jsonl").write_text(json.dumps(WINOGRANDE) + "\n")
    assert read("winogrande", tmp_path, "train") == [dict(WINOGRANDE, label=1)]
    (tmp_path / "train.data.txt").write_text("bank\tN\t0-1\tA bank .\tBanks .\n")
    (tmp_path / "train.gold.txt").write_text("T\n")
    row = dict(word="bank", sentence1="A bank .", sentence2="Banks .", label=1)
    assert read("wic", tmp_path, "train") == [row]


def test_a_folder_of_the_tasks_name_is_found(tmp_path):
    tsv(tmp_path / "sst2", "dev", [("good", 1)])
    for task in ("sst2", "sst2-sentences"):
        assert read(task, tmp_path, "dev") == [dict(sentence="good", label=1)]


@pytest.mark.parametrize(
    ("task", "file", "text", "message"),
    [
        ("sst2", "train.tsv", "text\tlabel\nfine\t1\n", r"header must name sentence and label"),
        ("sst2", "train.tsv", "hello\n1\n", r"must name sentence and label, got \['hello'\]"),
        ("sst2", "train.tsv", "sentence\tlabel\nfine\t2\n", r"row 1: label must be one of .*'2'"),
        ("sst2", "train.tsv", "sentence\tlabel\nfine\n", r"row 1: label must be one of .* got ''"),
        ("copa", "train.jsonl", "{}\n", r"the file has no rows"),
        (
            "copa",
            "train.jsonl",
            '{"label": 1}\n',
            r"row 1: copa needs the text 'premise', got None",
        ),
        ("copa", "train.jsonl", json.dumps(COPA) + "\nno json\n", "JSON parse error: .* row 1"),
        ("winogrande", "train_m.jsonl", json.dumps({**WINOGRANDE, "answer": ""}), "answer must be"),
        ("wic", "train.data.txt", "a\tb\n", "no such file"),
    ],
)
def test_bad_files(task, file, text, message, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=message):
        read(task, tmp_path, "train")


def test_bad_encoding(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(DataError, match=r"train\.tsv: must be UTF-8"):
        read("sst2", tmp_path, "train")


def test_bad_wic_files(tmp_path):
    (tmp_path / "train.data.txt").write_text("a\tb\n")
    (tmp_path / "train.gold.txt").write_text("T\nF\n")
    with pytest.raises(DataError, match="1 answers expected, got 2"):
        read("wic", tmp_path, "train")
    (tmp_path / "train.gold.txt").write_text("T\n")
    with pytest.raises(DataError, match="5 cells expected, got 2"):
        read("wic", tmp_path, "train")
    (tmp_path / "train.data.txt").write_text("bank\tN\t0-1\ta\tb\n")
    (tmp_path / "train.gold.txt").write_text("X\n")
    with pytest.raises(DataError, match="got 'X'"):
        read("wic", tmp_path, "train")


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="task must be one of"):
        read("squad", tmp_path, "train")
    with pytest.raises(ValueError, match="split must be"):
        read("copa", tmp_path, "test")
    with pytest.raises(DataError, match="no such file or folder"):
        read("copa", tmp_path / "nowhere", "train")


def test_rows_of_the_hub(monkeypatch):
    """A data set of the hub is read by the same checks."""
    asked = []

    def load_dataset(*name, split):
        asked.append((*name, split))
        rows = {"train": [COPA] * 3, "validation": [dict(COPA, label=0)]}[split]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("copa", "hub", "train") == [COPA] * 3
    assert read("copa", "hub", "dev") == [dict(COPA, label=0)]
    assert asked == [
        ("aps/super_glue", "copa", "train"),
        ("aps/super_glue", "copa", "validation"),
    ]
    with pytest.raises(DataError, match=r"winogrande, row 1: .*'sentence'"):
        read("winogrande", "hub", "train")

    def unreachable(*name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"aps/super_glue/copa: cannot be loaded \(no network\)"):
        read("copa", "hub", "train")


def test_default_source(monkeypatch, tmp_path):
    assert tasks.default_source("sentiment") == tasks.DEMO_DATA
    monkeypatch.setenv("ZOFO_DATA", str(tmp_path))
    assert tasks.default_source("wic") == tmp_path
    monkeypatch.delenv("ZOFO_DATA")
    with pytest.raises(DataError, match="environment variable ZOFO_DATA"):
        tasks.default_source("wic")


def test_protocol(tmp_path):
    tsv(tmp_path, "train", [(f"s{i}", i % 2) for i in range(40)])
    tsv(tmp_path, "dev", [(f"t{i}", i % 2) for i in range(9)])
    sizes = dict(train=20, dev=5, test=7)
    first = protocol("sst2", tmp_path, seed=1, **sizes)
    assert first == protocol("sst2", tmp_path, seed=1, **sizes)
    assert first != protocol("sst2", tmp_path, seed=2, **sizes)
    assert [len(part) for part in first] == [20, 5, 7]
    sentences = [row["sentence"] for part in first for row in part]
    assert len(set(sentences)) == len(sentences)
    # One may be larger than the other; what there is too little of is shared.
    parts = protocol("sst2", tmp_path, seed=1, train=4, dev=20, test=1)
    assert [len(part) for part in parts] == [4, 20, 1]
    few = protocol("sst2", tmp_path, seed=1, train=1000, dev=15, test=1000)
    assert [len(part) for part in few] == [25, 15, 9]
    half = protocol("sst2", tmp_path, seed=1)
    assert [len(part) for part in half] == [20, 20, 9]


def test_one_label_cannot_be_learned(tmp_path):
    for split in ("train", "dev"):
        tsv(tmp_path, split, [("fine", 1), ("good", 1), ("great", 1)])
    with pytest.raises(DataError, match="must have two labels"):
        protocol("sst2", tmp_path, seed=0)
    assert len(protocol("sst2-sentences", tmp_path, seed=0)[0]) == 2


def test_no_examples(tmp_path):
    tsv(tmp_path, "train", [("fine", 1), ("bad", 0)])
    tsv(tmp_path, "dev", [])
    with pytest.raises(DataError, match=r"dev\.tsv: there are no rows below the header"):
        protocol("sst2", tmp_path, seed=0)
    tsv(tmp_path, "dev", [("fine", 1)])
    with pytest.raises(DataError, match="no development examples"):
        protocol("sst2", tmp_path, seed=0, dev=0)


def test_demo_data_is_balanced_and_has_no_duplicates():
    parts = [read("sentiment", tasks.DEMO_DATA, split) for split in ("train", "dev")]
    assert [len(part) for part in parts] == [400, 100]
    for rows in parts:
        assert sum(row["label"] for row in rows) * 2 == len(rows)
    sentences = [
        "".join(filter(str.isalnum, r["sentence"].lower())) for part in parts for r in part
    ]
    assert len(set(sentences)) == len(sentences)


@needs_data
@pytest.mark.parametrize(
    ("task", "train", "dev"),
    [("sst2", 67349, 872), ("copa", 400, 100), ("winogrande", 2558, 1267), ("wic", 5428, 638)],
)
def test_the_real_files(task, train, dev):
    for split, count in (("train", train), ("dev", dev)):
        rows = read(task, DATA, split)
        assert len(rows) == count
        assert {row["label"] for row in rows} == {0, 1}
        for choice in FORMS[task].choices(rows):
            assert len(choice.options) == 2
            assert all(prompt and text.strip() for prompt, text in choice.options)
        for example in FORMS[task].examples(rows):
            assert all(text.strip() for texts in example.rows for text in texts)
    parts = protocol(task, DATA, seed=1)
    assert [len(part) for part in parts] == [min(1000, train - 100), 100, min(1000, dev)]
